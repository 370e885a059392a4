"""`train_groups`: one expert for each group of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from transformers import PreTrainedModel

from ..library.adapter import check_name
from ..library.library import AdapterLibrary
from .data import Examples, joined, read_examples
from .reading import DatasetLike
from .saving import check_named, check_output, finish, told_of, work_folder
from .setup import set_up
from .stage import train_stage


def read_groups(
    groups: Mapping[str, Sequence[str]], datasets: Mapping[str, DatasetLike] | Mapping[str, Examples]
) -> dict[str, Examples]:
    """The joined rows of each group, every task read once.

    Raises:
        ValueError: no groups, an empty one, a task without dataset, a name that is not allowed, or bad rows.
    """
    if not groups:
        raise ValueError("groups is empty; at least one group is needed.")
    read: dict[str, Examples] = {}
    for group, tasks in groups.items():
        check_name(group)
        if isinstance(tasks, str) or not tasks:
            raise ValueError(f"groups[{group!r}]={tasks!r} is not allowed; it must be a list of at least one task.")
        for task in tasks:
            if task not in datasets:
                raise ValueError(f"groups[{group!r}] holds {task!r}, for which there is no dataset: {list(datasets)}.")
            if task not in read:
                given = datasets[task]
                read[task] = given if isinstance(given, Examples) else read_examples(task, given)
    return {group: joined(group, [read[task] for task in tasks]) for group, tasks in groups.items()}


def train_groups(
    base: PreTrainedModel | str | PathLike,
    groups: Mapping[str, Sequence[str]],
    datasets: Mapping[str, DatasetLike],
    *,
    output_dir: str | PathLike,
    steps: int | Mapping[str, int] | None = None,
    made: Mapping[str, Any] | None = None,
    **training: Any,
) -> AdapterLibrary:
    """Train one expert for each group, from scratch, on the joined data of its tasks.

    Args:
        base: as in `train_adapter`, and so are `sft_config`, `lora_config`, `init_seed`, `tokenizer`,
            `base_model_kwargs`, `overwrite` and `progress`.
        groups (`Mapping[str, list[str]]`): expert name -> its tasks; a task may be in several.
        datasets (`Mapping`): task name -> its rows, in any form of `read_examples`.
        output_dir (`str` or `PathLike`): the library's folder; it appears when all experts are trained. Until then,
            and for the next run, they lie in `<output_dir>-training/`.
        steps (`int` or `Mapping`, *optional*): optimizer steps of every expert, or of each.
        made (`Mapping`, *optional*): more for the card's part on how it was made.

    Returns:
        `AdapterLibrary`: the saved library. Experts that a run before trained in the same way are not trained again.

    Raises:
        ValueError: bad groups, rows or configs; nothing is trained then.
        TrainingFailed: some experts failed; the others are finished and saved.
    """
    target, setup = check_output(output_dir), set_up(base, **training)
    check_named(setup.base)
    parts = read_groups(groups, datasets)
    stage = train_stage(
        "groups",
        setup.base,
        parts,
        work_folder(target) / "groups",
        setup.plan,
        setup.processes,
        steps=dict.fromkeys(groups, steps) if isinstance(steps, int) else steps,
        progress=setup.progress,
    )
    told = {
        "made with": "peft_arrow.train_groups",
        "groups": {group: list(tasks) for group, tasks in groups.items()},
        **told_of(stage, setup.plan),
        "stages": [stage.report()],
        **(made or {}),
    }
    return finish(stage, setup.base, target, setup.processes, told, "One expert for each group of tasks.")
