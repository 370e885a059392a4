"""Many experts, one after another: what is finished is skipped, what fails is told at the end, nothing else stops."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from ..library.adapter import check_name
from ..library.library import AdapterLibrary
from ..library.manifest import MANIFEST_NAME, Origin
from .base import Base
from .data import DatasetLike, Examples, joined, read_examples
from .errors import TASK_ERRORS, TrainingFailed
from .expert import Job, Plan, finished, moved, plan_job, train_job
from .processes import Processes
from .recipe import INIT_SEED
from .record import TrainingRecord, all_versions


_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """What became of the experts of one stage.

    Args:
        name (`str`): such as `private` or `clusters`.
        folder (`Path`): each expert lies in a folder of its name in it.
        records (`dict[str, TrainingRecord]`): of the finished ones, in the order they were asked for.
        failures (`dict[str, str]`): of the others, what went wrong.
    """

    name: str
    folder: Path
    records: dict[str, TrainingRecord]
    failures: dict[str, str]

    def report(self) -> dict[str, Any]:
        """Experts, steps and tokens of the stage."""
        records = self.records.values()
        return {
            "stage": self.name,
            "experts": len(self.records),
            "steps": sum(record.steps for record in records),
            "tokens": sum(record.tokens for record in records),
        }

    def library(self, base_model: str) -> AdapterLibrary | None:
        """The finished experts, each with its tasks in its origin; None where there are none."""
        if not self.records:
            return None
        found = AdapterLibrary.from_pretrained({name: self.folder / name for name in self.records}, base_model)
        told = {
            name: replace(adapter, origin=_origin(self.records[name], adapter.origin))
            for name, adapter in found.items()
        }
        return AdapterLibrary(told, base_model)


def _origin(record: TrainingRecord, origin: Origin) -> Origin:
    return replace(origin, source=record.name, task=", ".join(record.tasks), datasets=tuple(record.sources))


def train_stage(
    name: str,
    base: Base,
    parts: Mapping[str, Examples],
    folder: Path,
    plan: Plan,
    processes: Processes,
    *,
    steps: Mapping[str, int] | None = None,
    progress: bool = True,
) -> Stage:
    """Train an expert on each part into `folder`, those that are missing; all are checked before the first begins.

    Args:
        name (`str`): of the stage, for the bar and the report.
        base (`Base`): loaded when the first expert needs it.
        parts (`Mapping[str, Examples]`): expert name -> its rows.
        folder (`Path`): of the stage.
        plan (`Plan`): for all experts.
        processes (`Processes`): the experts are divided over them.
        steps (`Mapping[str, int]`, *optional*): optimizer steps of each expert, in the place of epochs.
        progress (`bool`): show bars, and a line for each expert.

    Raises:
        ValueError: an expert's rows or configs are bad, or it was trained in another way before.
    """
    jobs = {
        expert: plan_job(base, examples, folder / expert, plan, (steps or {}).get(expert))
        for expert, examples in parts.items()
    }
    todo = [expert for expert, job in jobs.items() if finished(job, plan.overwrite) is None]
    todo = processes.from_main(todo)
    skipped = f", {len(jobs) - len(todo)} of {len(jobs)} are there already" if len(todo) < len(jobs) else ""
    mine = processes.mine(todo)
    failures = []
    shown = progress and processes.is_main
    with tqdm(mine, desc=f"{name} experts{skipped}", unit="expert", disable=not shown) as bar:
        for expert in bar:
            reason = try_job(base, jobs[expert], plan, processes, progress)
            if reason is not None:
                failures.append((expert, reason))
    failed = dict(processes.gather(failures))
    records = {expert: TrainingRecord.read(job.folder) for expert, job in jobs.items() if expert not in failed}
    return Stage(name, folder, records, {expert: failed[expert] for expert in jobs if expert in failed})


def try_job(base: Base, job: Job, plan: Plan, processes: Processes, progress: bool) -> str | None:
    """Train one expert and tell in one line what came of it; returns why it failed, or None."""
    with tqdm(desc=job.name, unit="step", leave=False, disable=not (progress and processes.is_main)) as bar:
        try:
            record = train_job(base, job, plan, processes, moved(bar))
        except (*TASK_ERRORS, SafetensorError) as error:
            _LOGGER.debug("expert %s failed", job.name, exc_info=True)
            told = (str(error).splitlines() or [""])[0]
            reason, line = f"{type(error).__name__}: {told}", f"{job.name}: failed, {told}"
        else:
            reason, line = None, record.told()
    if progress:
        tqdm.write(line, file=sys.stderr)
    return reason


def work_folder(output_dir: Path) -> Path:
    """Where the experts of a library are trained: beside it, so that the library itself appears whole."""
    return output_dir.parent / f"{output_dir.name}-training"


def check_output(output_dir: str | PathLike) -> Path:
    """The library's folder; a `ValueError` where something else than a library lies there."""
    target = Path(output_dir).expanduser()
    is_free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    if not is_free and not (target / MANIFEST_NAME).is_file():
        raise ValueError(
            f"output_dir={str(target)!r} holds something else than a library; give a new or empty folder."
        )
    return target


def check_named(base: Base) -> None:
    """A `ValueError` where the base has no name: a library names its base model."""
    if not base.name:
        raise ValueError("base has no name for the library to state; set base.config._name_or_path to its Hub id.")


def finish(
    stage: Stage,
    base: Base,
    target: Path,
    processes: Processes,
    made: Mapping[str, Any],
    description: str,
    failures: Mapping[str, str] | None = None,
) -> AdapterLibrary:
    """Save a stage's experts as a library with its card.

    Raises:
        TrainingFailed: some experts failed, of this stage or of `failures`; the others are saved, and the card names
            what is missing.
    """
    failed = {**(failures or {}), **stage.failures}
    library = stage.library(base.name)
    if library is not None:
        told = {**made, **({"failed": failed} if failed else {})}
        if processes.is_main:
            library.describe(description, made=told).save_pretrained(target)
        processes.gather([])
        library = AdapterLibrary.from_pretrained(target)
    if failed:
        raise TrainingFailed(failed, library, str(target))
    return library


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
    sft_config: SFTConfig | Mapping[str, Any] | None = None,
    lora_config: LoraConfig | Mapping[str, Any] | None = None,
    steps: int | Mapping[str, int] | None = None,
    init_seed: int = INIT_SEED,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base_model_kwargs: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> AdapterLibrary:
    """Train one expert for each group, from scratch, on the joined data of its tasks.

    Args:
        base, sft_config, lora_config, init_seed, tokenizer, base_model_kwargs, overwrite: as in `train_adapter`.
        groups (`Mapping[str, list[str]]`): expert name -> its tasks; a task may be in several.
        datasets (`Mapping`): task name -> its rows, in any form of `read_examples`.
        output_dir (`str` or `PathLike`): the library's folder; it appears when all experts are trained. Until then,
            and for the next run, they lie in `<output_dir>-training/`.
        steps (`int` or `Mapping`, *optional*): optimizer steps of every expert, or of each.
        progress (`bool`): show bars, and a line for each expert.

    Returns:
        `AdapterLibrary`: the saved library. Experts that a run before trained in the same way are not trained again.

    Raises:
        ValueError: bad groups, rows or configs; nothing is trained then.
        TrainingFailed: some experts failed; the others are finished.
    """
    target, processes = check_output(output_dir), Processes()
    opened, plan = Base(base, tokenizer, base_model_kwargs), Plan(sft_config, lora_config, init_seed, overwrite)
    check_named(opened)
    parts = read_groups(groups, datasets)
    budget = dict.fromkeys(groups, steps) if isinstance(steps, int) else steps
    folder = work_folder(target) / "groups"
    stage = train_stage("group", opened, parts, folder, plan, processes, steps=budget, progress=progress)
    made = {
        "made with": "peft_arrow.train_groups",
        "groups": {group: list(tasks) for group, tasks in groups.items()},
        **told_of(stage, plan),
        "stages": [stage.report()],
    }
    return finish(stage, opened, target, processes, made, "One expert for each group of tasks.")


def told_of(stage: Stage, plan: Plan) -> dict[str, Any]:
    """What a card tells of how the experts of a stage were trained: seeds, the recipe's main fields, versions."""
    identity = next(iter(stage.records.values())).identity if stage.records else {}
    fields = (
        "lora.r lora.lora_alpha lora.lora_dropout sft.learning_rate sft.lr_scheduler_type sft.weight_decay "
        "sft.max_grad_norm sft.per_device_train_batch_size sft.gradient_accumulation_steps sft.max_length"
    ).split()
    return {
        "seeds": {"init": plan.init_seed, "training": identity.get("sft.seed")},
        "recipe": {name.partition(".")[2]: identity[name] for name in fields if name in identity},
        "versions": all_versions(),
    }
