"""All methods of one library, on one base that is loaded once; what is kept in the store is not judged again."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..library.transforms import random_like
from .batches import Around
from .cells import RowReader
from .fingerprints import digest_of
from .methods import Method
from .plans import Plan
from .routed import RoutedLibrary, resolved_options, routing_defaults
from .store import ResultStore
from .tasks import JudgedTask, evenly


@dataclass(frozen=True)
class Session:
    """What all libraries of a report share.

    Args:
        base (`torch.nn.Module`): the base model; `base_mark` is its fingerprint.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        tasks (`Sequence[JudgedTask]`): the tasks.
        reader (`RowReader`): judges rows.
        store (`ResultStore`): keeps results.
        bar (`tqdm`): counts them.
    """

    base: torch.nn.Module
    base_mark: str
    tokenizer: PreTrainedTokenizerBase
    tasks: Sequence[JudgedTask]
    reader: RowReader
    store: ResultStore
    bar: tqdm


class LibraryJudge:
    """Judges the methods of one library.

    Args:
        session (`Session`): what is shared.
        label (`str`): the library's name in files.
        plan (`Plan`): what is judged of it.
    """

    def __init__(self, session: Session, label: str, plan: Plan) -> None:
        self.session, self.label, self.plan = session, label, plan
        self.routed: RoutedLibrary | None = None
        self.in_use: tuple[str, int | None] | None = None
        self.defaults = routing_defaults(plan.options.top_k)

    def run(self) -> dict[str, Any]:
        """Judge all methods.

        Returns:
            `dict`: `experts`, `own`, `alone` (expert, or "" for the base -> task -> losses on rows for selection and
            on judged rows), `best_single`, and `methods` (name -> `told` and `runs`).
        """
        plan, runs = self.plan, {}
        try:
            alone = self._alone()
            best = best_single(alone)
            for method in sorted(plan.methods, key=lambda method: method.kind == "random_lora"):
                runs[method.name] = [{"seed": seed, "tasks": self._run(method, seed, best)} for seed in method.seeds]
        finally:
            self._close()
        methods = {
            method.name: {"told": method.told(), "kind": method.kind, "runs": runs[method.name]}
            for method in plan.methods
        }
        return {
            "fingerprint": plan.mark,
            "experts": list(plan.library),
            "own": dict(plan.own),
            "best_single": best,
            "fit_repeated": plan.fit_repeated,
            "alone": alone,
            "methods": methods,
        }

    def _run(self, method: Method, seed: int | None, best: str | None) -> dict[str, dict]:
        found = {}
        for task in self.session.tasks:
            experts = {"pinned": method.experts, "best_single": best, "oracle": self.plan.own.get(task.name)}.get(
                method.kind
            )
            if method.kind == "oracle" and experts is None:
                continue
            found[task.name] = self._cell(method, seed, task, experts)
            self.session.bar.update()
        return found

    def _cell(self, method: Method, seed: int | None, task: JudgedTask, experts: Any) -> dict:
        session = self.session
        session.bar.set_postfix_str(f"{self.label} {method.name} {task.name}".strip()[:50])
        key = {**self._way(method, seed, experts), **self._key(task), "rows": task.fingerprint}
        is_routed = method.kind in ("routed", "random_lora")

        def compute() -> dict:
            model, around = self._start(method, seed, experts)
            return session.reader.judge(model, task, around, is_routed)

        name = f"{method.name}{'' if seed is None else f'-{seed}'}-{task.name}"
        return session.store.fill(name, key, compute)

    def _key(self, task: JudgedTask) -> dict[str, Any]:
        reader = self.session.reader
        return {
            "base": self.session.base_mark,
            "task": task.name,
            "reading": reader.reading.mark(),
            "metrics": sorted(reader.scorers) if task.kind == "generation" and reader.reading.generate else [],
        }

    def _way(self, method: Method, seed: int | None, experts: Any) -> dict[str, Any]:
        """What decides the result of a method beside base, task and reading."""
        if method.kind == "base":
            return {"way": "base"}
        if experts is not None:
            return {"way": "pinned", "library": self.plan.mark, "experts": experts}
        options = resolved_options(method, seed, self.defaults)
        way = {"way": method.kind, "library": self.plan.mark, "router": method.router, "options": options}
        if method.kind == "random_lora":
            return {**way, "lora_seed": seed}
        return {**way, "aggregation": method.aggregation, "fit": self.plan.fit_mark if method.needs_data else None}

    def _start(self, method: Method, seed: int | None, experts: Any) -> tuple[torch.nn.Module, Around]:
        """The model, set up for a method, and what is open while it reads a batch."""
        routed = self._open(seed if method.kind == "random_lora" else None)
        if method.kind == "base":
            return routed.model, routed.base
        if experts is not None:
            self.in_use = None
            return routed.model, routed.pinned(experts)
        if self.in_use != (method.name, seed):
            routed.use(method, seed, self.plan.fit_data, self.session.tokenizer)
            self.in_use = (method.name, seed)
        return routed.model, routed.nothing

    def _open(self, lora_seed: int | None) -> RoutedLibrary:
        if self.routed is None or self.routed.lora_seed != lora_seed:
            self._close()
            library = self.plan.library if lora_seed is None else random_like(self.plan.library, seed=lora_seed)
            self.routed = RoutedLibrary(self.session.base, library, self.plan.options.top_k, lora_seed)
        return self.routed

    def _close(self) -> None:
        if self.routed is not None:
            self.routed.close()
        self.routed = self.in_use = None

    def _alone(self) -> dict[str, dict]:
        """The base (as "") and every expert by itself, on rows for selection and on as many judged ones."""
        tasks = [task for task in self.session.tasks if task.selection]
        found: dict[str, dict] = {}
        for expert in ["", *self.plan.library] if tasks else []:
            method = Method("base", "base") if expert == "" else Method(expert, "pinned", experts=expert)
            found[expert] = {task.name: self._losses(method, task) for task in tasks}
        return found

    def _losses(self, method: Method, task: JudgedTask) -> dict[str, list[float]]:
        session, experts = self.session, method.experts
        session.bar.set_postfix_str(f"{self.label} {method.name} alone, {task.name}".strip()[:50])
        parts = {"selection": task.selection, "judged": evenly(task.rows, self.plan.options.selection_rows)}
        marks = {name: digest_of([astuple(row) for row in rows]) for name, rows in parts.items()}
        key = {**self._way(method, None, experts), "base": session.base_mark, "task": task.name, "alone": marks}
        key["truncate"] = session.reader.reading.truncate

        def compute() -> dict[str, list[float]]:
            model, around = self._start(method, None, experts)
            return {name: session.reader.losses(model, rows, around) for name, rows in parts.items()}

        found = session.store.fill(f"alone-{method.name}-{task.name}", key, compute)
        session.bar.update()
        return found


def best_single(alone: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> str | None:
    """The expert with the lowest mean loss on the rows for selection, tasks with equal weights; None without."""
    means = {
        expert: statistics.fmean(statistics.fmean(losses["selection"]) for losses in tasks.values())
        for expert, tasks in alone.items()
        if expert
    }
    return min(means, key=means.__getitem__) if means else None
