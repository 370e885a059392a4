"""The ways to adapt a library to a new task (arXiv 2405.11157, section 4.3), each as one LoRA and how it learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..library.adapter import Adapter
from ..training.base import Base
from ..training.data import Examples
from .arrow_weights import arrow_weights
from .readable import encoded_rows
from .starts import Experts, Factors, mixed


@dataclass(frozen=True)
class Task:
    """What a method may look at: base, rows, experts, and all options of methods."""

    base: Base = field(repr=False)
    examples: Examples = field(repr=False)
    experts: Experts = field(repr=False)
    options: Mapping[str, Any]

    @property
    def members(self) -> list[Adapter]:
        """The experts as adapters."""
        return list(self.experts.members)


@dataclass(frozen=True)
class Method:
    """One way to adapt.

    Args:
        summary (`str`): what it is, for people.
        start (`Callable`, *optional*): what the LoRA is before training; None: fresh, or the method trains otherwise.
        tunes_experts (`bool`): where weights over the library are learnt, its factors are too.
        is_searched (`bool`): without gradients.
        options (`tuple[str, ...]`): of `aggregation`, `top_k`, `rows` and `evaluations`, those that it has.
        needs_library (`bool`): it starts from experts.
    """

    summary: str
    start: Callable[[Task], Factors] | None = None
    tunes_experts: bool = False
    is_searched: bool = False
    options: tuple[str, ...] = ()
    needs_library: bool = True


def _shared(task: Task) -> Factors:
    return {module: (stack_A[0], stack_B[0]) for module, (stack_A, stack_B) in task.experts.items()}


def _mean(task: Task) -> Factors:
    count = len(task.members)
    weights = {module: [1 / count] * count for module in task.experts.modules}
    return mixed(task.experts, weights, task.options["aggregation"])


def _arrow(task: Task) -> Factors:
    rows = [row.ids for row in encoded_rows(task, task.options["rows"], "arrow")]
    found = arrow_weights(task.base.model, task.members, rows, top_k=task.options["top_k"])
    return mixed(task.experts, found, task.options["aggregation"])


METHODS: dict[str, Method] = {
    "scratch": Method("a fresh LoRA", needs_library=False),
    "shared": Method("goes on training a library's one expert, such as the paper's Shared", _shared),
    "mean": Method("starts from the mean of the experts", _mean, options=("aggregation",)),
    "arrow": Method(
        "starts from the experts as Arrow weights them on the task's rows, module by module (not in the paper)",
        _arrow,
        options=("aggregation", "top_k", "rows"),
    ),
    "poly": Method("tunes weights over the library in every module, and its experts", tunes_experts=True),
    "polyz": Method("tunes weights over the library in every module alone"),
    "lorahub": Method(
        "searches one weight an expert, without gradients (arXiv 2307.13269)",
        is_searched=True,
        options=("rows", "evaluations"),
    ),
}
