"""Many experts, one after another: what is finished is skipped, what fails is told at the end, nothing else stops."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..library.library import AdapterLibrary
from ..library.manifest import Origin
from .base import Base
from .data import Examples
from .errors import TASK_ERRORS
from .jobs import Job, Plan, finished, plan_job, train_job
from .processes import Processes
from .progress import Reporter, forget_notes, planned_steps, reporting
from .record import TrainingRecord


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
        base (`Base`): loaded when an expert is missing.
        parts (`Mapping[str, Examples]`): expert name -> its rows.
        folder (`Path`): of the stage.
        plan (`Plan`): for all experts.
        processes (`Processes`): the experts are divided over them, so that all have about the same number of steps.
        steps (`Mapping[str, int]`, *optional*): optimizer steps of each expert, in the place of epochs.
        progress (`bool`): show a bar, and a line for each expert.

    Raises:
        ValueError: an expert's rows or configs are bad, it was trained in another way before, or the base is bad.
        OSError: the folder cannot be made, or the base cannot be fetched.
    """
    jobs = {
        expert: plan_job(base, examples, folder / expert, plan, (steps or {}).get(expert))
        for expert, examples in parts.items()
    }
    if processes.is_main:
        forget_notes(folder)
    todo = [expert for expert, job in jobs.items() if finished(job, plan.overwrite) is None]
    todo = processes.from_main(todo)
    skipped = f", {len(jobs) - len(todo)} of {len(jobs)} experts are there already" if len(todo) < len(jobs) else ""
    loads = {expert: planned_steps(jobs[expert].arguments, len(jobs[expert].examples.dataset)) for expert in todo}
    mine = processes.mine(todo, loads)
    if mine:
        folder.mkdir(parents=True, exist_ok=True)
        base.load()
    with reporting(f"stage {name}{skipped}", folder, loads, processes, progress) as reporter:
        reasons = [(expert, try_job(base, jobs[expert], plan, processes, reporter)) for expert in mine]
        failed = {expert: reason for expert, reason in processes.gather(reasons) if reason is not None}
    if processes.is_main:
        forget_notes(folder)
    records = {expert: TrainingRecord.read(job.folder) for expert, job in jobs.items() if expert not in failed}
    return Stage(name, folder, records, {expert: failed[expert] for expert in jobs if expert in failed})


def try_job(base: Base, job: Job, plan: Plan, processes: Processes, reporter: Reporter) -> str | None:
    """Train one expert and tell in one line what came of it; returns why it failed, or None.

    Raises:
        RuntimeError: of processes that train it together only some failed; see `Processes.agreed`.
    """
    on_step = reporter.begin(job.name)
    try:
        record = train_job(base, job, plan, processes, on_step)
    except (*TASK_ERRORS, SafetensorError) as error:
        _LOGGER.debug("expert %s failed", job.name, exc_info=True)
        told = (str(error).splitlines() or [""])[0]
        reason, line = f"{type(error).__name__}: {told}", f"{job.name}: failed, {told}"
    else:
        reason, line = None, record.told()
    reporter.end(line)
    return processes.agreed(reason)
