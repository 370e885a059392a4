"""Which experts the tokens of a task went to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from ..tuner.trace import RoutingTrace


LayerShares = Mapping[str, Sequence[float]]


def layer_shares(trace: RoutingTrace) -> dict[str, list[float]]:
    """Layer -> share of the routing weight of each expert, and last of the base where it is a candidate; sum 1."""
    return {layer: [round(share, 5) for share in shares] for layer, shares in trace.shares("layer").items()}


def overall(shares: LayerShares) -> list[float]:
    """Each expert's share over all layers, each layer with the same weight."""
    return [math.fsum(column) / len(shares) for column in zip(*shares.values(), strict=True)]


def mean_shares(tasks: Sequence[LayerShares]) -> list[float]:
    """Each expert's share over tasks, each task with the same weight."""
    return [math.fsum(column) / len(tasks) for column in zip_longest(*map(overall, tasks), fillvalue=0.0)]


def largest_change(tasks: Sequence[LayerShares]) -> float:
    """How much the shares of a layer differ between two tasks at most: total variation, from 0 to 1."""
    largest = 0.0
    for number, ours in enumerate(tasks):
        for other in tasks[number + 1 :]:
            for layer in ours:
                moved = math.fsum(abs(a - b) for a, b in zip_longest(ours[layer], other[layer], fillvalue=0.0)) / 2
                largest = max(largest, moved)
    return largest


def own_share(shares: Mapping[str, LayerShares], own: Mapping[str, int]) -> float | None:
    """The share of the routing weight on the task's own expert, averaged over tasks.

    Args:
        shares (`Mapping`): task -> shares by layer.
        own (`Mapping[str, int]`): task -> position of its own expert; tasks without one are left out.
    """
    known = [overall(shares[task])[place] for task, place in own.items() if task in shares]
    return math.fsum(known) / len(known) if known else None
