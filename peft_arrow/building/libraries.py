"""`train_library`: from data sets to a saved library of one of the paper's kinds."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from ..library.library import AdapterLibrary
from ..training.base import Base
from ..training.expert import Plan
from ..training.groups import check_named, check_output, finish, told_of, work_folder
from ..training.processes import Processes
from ..training.recipe import INIT_SEED, sft_arguments
from .budget import steps_of_tasks
from .kinds import CLUSTERED, KINDS, Build, Built, describe
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
    sft_config: SFTConfig | Mapping[str, Any] | None = None,
    lora_config: LoraConfig | Mapping[str, Any] | None = None,
    init_seed: int = INIT_SEED,
    embedding: str = "delta",
    n_skills: int = 8,
    n_splits: int = 4,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base_model_kwargs: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    made: Mapping[str, Any] | None = None,
) -> AdapterLibrary:
    """Build a library of experts from data sets.

    Every kind takes the same number of optimizer steps in all, which is `steps` times the number of tasks; `mbc` takes
    40 % of them for the private adapters and 60 % for the clusters' experts, which are trained from scratch.

    Args:
        base, sft_config, lora_config, init_seed, tokenizer, base_model_kwargs, overwrite: as in `train_adapter`.
        datasets: task name -> rows; or a folder with one file a task, or a list of files and Hub ids.
        kind (`str`): `private` (an expert a task), `shared` (one for all), `mbc` (Model-Based Clustering), and the
            controls `random` (tasks dealt out), `random_examples` (rows dealt out), `embedding` (tasks grouped by the
            base's mean hidden state), `poly` and `mhr` (skills shared by all tasks, as plain LoRAs).
        output_dir (`str` or `PathLike`): the library's folder; it appears when the library is complete. The experts of
            all stages are kept in `<output_dir>-training/`, where the next run finds what is finished.
        n_clusters (`int` or `"auto"`): for the clustered kinds; `"auto"` for `mbc` only.
        steps (`int`, *optional*): optimizer steps a task; by default `max_steps` or the epochs of `sft_config`.
        seed (`int`): of partitions and clustering; that of training is in `sft_config`.
        embedding (`str`): `"delta"` or `"paper"`, of MBC.
        n_skills, n_splits (`int`): of Poly and MHR.
        progress (`bool`): show bars, and a line for each expert.
        made (`Mapping`, *optional*): more for the card's part on how it was made, such as `command`.

    Returns:
        `AdapterLibrary`: the saved library; `library.notes.made["stages"]` has steps and tokens of each stage.

    Raises:
        ValueError: an unknown kind, more clusters than tasks, bad rows or configs; nothing is trained then.
        TrainingFailed: some experts failed; all others are finished and saved.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; allowed are {list(KINDS)}.")
    target, processes = check_output(output_dir), Processes()
    opened, plan = Base(base, tokenizer, base_model_kwargs), Plan(sft_config, lora_config, init_seed, overwrite)
    check_named(opened)
    parts = read_tasks(datasets)
    if kind in CLUSTERED:
        check_clusters(n_clusters, kind, len(parts))
    folder = work_folder(target)
    budget = steps_of_tasks(parts, sft_arguments(sft_config, folder), steps)
    build = Build(
        opened, parts, budget, folder, plan, processes, n_clusters, seed, embedding, n_skills, n_splits, progress
    )
    built = KINDS[kind](build)
    told = {**told_of_build(kind, build, built), **(made or {})}
    earlier = {name: reason for stage in built.stages[:-1] for name, reason in stage.failures.items()}
    return finish(built.stages[-1], opened, target, processes, told, describe(kind), earlier)


def check_clusters(n_clusters: int | str, kind: str, tasks: int) -> None:
    """Refuse numbers of clusters that cannot be: each of the clustered kinds puts at least one task in a cluster."""
    if n_clusters == "auto" and kind == "mbc":
        return
    is_number = isinstance(n_clusters, int) and not isinstance(n_clusters, bool)
    if not is_number or n_clusters < 1 or (n_clusters > tasks and kind != "random_examples"):
        auto = ", or 'auto'" if kind == "mbc" else ""
        raise ValueError(f"n_clusters={n_clusters!r} is not allowed for {tasks} tasks; it must be 1 to {tasks}{auto}.")


def told_of_build(kind: str, build: Build, built: Built) -> dict[str, Any]:
    """What a library's card tells of how it was built."""
    asked = {"n_clusters": build.n_clusters} if kind in CLUSTERED else {}
    asked |= {"embedding": build.embedding} if kind == "mbc" else {}
    asked |= {"n_skills": build.n_skills} if kind in ("poly", "mhr") else {}
    asked |= {"n_splits": build.n_splits} if kind == "mhr" else {}
    told = told_of(built.stages[0], build.plan)
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
        **told,
    }
