"""`train_library`: from data sets to a saved library of one of the paper's kinds."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from transformers import PreTrainedModel

from ..library.library import AdapterLibrary
from ..training.recipe import sft_arguments
from ..training.saving import check_named, check_output, finish, told_of, work_folder
from ..training.setup import set_up
from .budget import steps_of_tasks
from .build import DEFAULTS, Build, Built, Options
from .kinds import CLUSTERED, KINDS, describe
from .tasks import TasksLike, read_tasks


def train_library(
    base: PreTrainedModel | str | PathLike,
    datasets: TasksLike,
    *,
    kind: str = "private",
    output_dir: str | PathLike,
    n_clusters: int | str = 10,
    steps: int | None = None,
    seed: int = 0,
    made: Mapping[str, Any] | None = None,
    options: Options = DEFAULTS,
    **training: Any,
) -> AdapterLibrary:
    """Build a library of experts from data sets.

    Every kind takes the same number of optimizer steps, `steps` times the number of tasks; `mbc` takes 40 % of them
    for the private adapters and 60 % for the clusters' experts, which are trained from scratch.

    Args:
        base: as in `train_adapter`, and so are all arguments that are not told here.
        datasets: task name -> rows; or a folder with one file a task, or a list of files and Hub ids.
        kind (`str`): `private`, `shared`, `mbc`, `random`, `random_examples`, `embedding`, `poly`, `mhr`.
        output_dir (`str` or `PathLike`): the library's folder; it appears when the library is complete. The experts of
            all stages, and pictures of a clustering, are in `<output_dir>-training/`, where the next run looks first.
        n_clusters (`int` or `"auto"`): for the clustered kinds; `"auto"` for `mbc` only.
        steps (`int`, *optional*): optimizer steps a task; by default `max_steps` or the epochs of `sft_config`.
        seed (`int`): of partitions and clustering; that of training is in `sft_config`.
        made (`Mapping`, *optional*): more for the card's part on how it was made.
        options (`Options`): of single kinds: the embedding of MBC, skills and splits of Poly and MHR.

    Returns:
        `AdapterLibrary`: the saved library; `library.notes.made["stages"]` has steps and tokens of each stage.

    Raises:
        ValueError: an unknown kind, more clusters than tasks, bad rows or configs; nothing is trained then.
        OSError: the Hub cannot be reached, or the disk is full; what is finished stays.
        TrainingFailed: some experts failed; all others are finished and saved.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; allowed are {list(KINDS)}.")
    target, setup, parts = check_output(output_dir), set_up(base, **training), read_tasks(datasets)
    check_named(setup.base)
    check_clusters(n_clusters, kind, len(parts))
    work = work_folder(target)
    budget = steps_of_tasks(parts, sft_arguments(setup.plan.sft_config, work), steps, 2 if kind == "mbc" else 1)
    build = Build(setup, parts, budget, work, n_clusters, seed, options)
    built = KINDS[kind](build)
    told = told_of_build(kind, build, built) | dict(made or {})
    also = {"failures": built.failed_before, "pictures": built.pictures}
    return finish(built.stages[-1], setup.base, target, setup.processes, told, describe(kind), **also)


def check_clusters(n_clusters: int | str, kind: str, tasks: int) -> None:
    """Refuse numbers of clusters that cannot be: each of the clustered kinds puts at least one task in a cluster."""
    if kind not in CLUSTERED:
        return
    if n_clusters == "auto" and kind == "mbc":
        if tasks < 3:
            raise ValueError(f"n_clusters='auto' is not allowed for {tasks} tasks; it needs at least 3.")
        return
    is_number = isinstance(n_clusters, int) and not isinstance(n_clusters, bool)
    if not is_number or n_clusters < 1 or (n_clusters > tasks and kind != "random_examples"):
        auto = ", or 'auto'" if kind == "mbc" else ""
        raise ValueError(f"n_clusters={n_clusters!r} is not allowed for {tasks} tasks; it must be 1 to {tasks}{auto}.")


def told_of_build(kind: str, build: Build, built: Built) -> dict[str, Any]:
    """What a library's card tells of how it was built."""
    asked = {"n_clusters": build.n_clusters} if kind in CLUSTERED else {}
    asked |= {"embedding": build.options.embedding} if kind == "mbc" else {}
    asked |= {"n_skills": build.options.n_skills} if kind in ("poly", "mhr") else {}
    asked |= {"n_splits": build.options.n_splits} if kind == "mhr" else {}
    told = told_of(built.stages[0], build.setup.plan)
    told["seeds"] = {**told["seeds"], "partition": build.seed}
    stages = [stage.report() for stage in built.stages]
    steps = sum(stage["steps"] for stage in stages)
    return {
        "kind": kind,
        **asked,
        "stages": stages,
        "steps": steps,
        "tokens": sum(stage["tokens"] for stage in stages),
        "groups": built.groups,
        **built.made,
        **told,
    }
