"""What the project set out to show, and whether it is met."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .side import BASE, OURS, PEFT, PLAIN


@dataclass(frozen=True)
class Target:
    """A ratio of two sides and its bound by number of experts.

    Args:
        work (`str`): what is measured.
        side, other (`str`): the ratio is `side / other`.
        at_most (`bool`): whether the bound is an upper one.
        bounds (`dict[int, float]`): number of experts -> bound.
    """

    work: str
    side: str
    other: str
    at_most: bool
    bounds: dict[int, float]


TARGETS = (
    Target("prefill", OURS, PLAIN, True, {8: 1.10, 32: 1.3, 128: 1.6, 1000: 4.0}),
    Target("decode", OURS, PLAIN, True, {8: 1.25, 32: 1.4, 128: 1.6, 1000: 3.0}),
    Target("prefill", PEFT, OURS, False, {8: 1.3, 32: 3.0, 128: 10.0}),
    Target("memory", PEFT, OURS, False, {8: 4.0, 32: 15.0, 128: 50.0}),
    Target("train", OURS, PEFT, True, {8: 0.6, 32: 0.3}),
    Target("load to first token", "PEFT", "peft-arrow", False, {8: 2.0, 32: 5.0, 128: 20.0}),
)
# Of a 7B Llama in bfloat16 on a GPU.
GPU_TARGETS = (Target("decode", OURS, BASE, True, {16: 1.2, 256: 1.5}),)
# Decoding with 1,000 experts takes less than twice the time of 128.
GROWTH = 2.0


def verdicts(
    work: str, experts: int, ratio: Callable[[str, str], float | None], targets: tuple[Target, ...] = TARGETS
) -> list[str]:
    """A line for each target of this work: the ratio, the bound, and whether it is met.

    Args:
        work (`str`): as in `TARGETS`.
        experts (`int`): E.
        ratio (`Callable[[str, str], float | None]`): of two sides; None where one was not run.
        targets (`tuple[Target, ...]`): which.
    """
    lines = []
    for target in targets:
        if target.work != work:
            continue
        found, bound = ratio(target.side, target.other), target.bounds.get(experts)
        named = f"{target.side} / {target.other}"
        if found is None:
            lines.append(f"{named}: not measured")
        elif bound is None:
            lines.append(f"{named}: {found:.2f} (no target at {experts} experts)")
        else:
            met = found <= bound if target.at_most else found >= bound
            sign = "<=" if target.at_most else ">="
            lines.append(f"{named}: {found:.2f}, target {sign} {bound:g}: {'met' if met else 'MISSED'}")
    return lines
