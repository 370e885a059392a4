"""How many experts the tokens of a forward go to, module by module."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from torch import nn


def touched_experts(ours: nn.Module, run: Callable[[nn.Module], object]) -> dict[str, int]:
    """Module -> the distinct experts that the tokens of what `run` does were sent to."""
    with ours.trace_routing() as trace:
        run(ours)
    found: dict[str, set[int]] = {}
    for step in trace.steps:
        for module, routing in step.modules.items():
            found.setdefault(module, set()).update(routing.top_k_index.unique().tolist())
    return {module: len(experts - {-1}) for module, experts in found.items()}


def told(touched: dict[str, int], experts: int) -> str:
    """For people."""
    counts = list(touched.values())
    return (
        f"a forward goes to {statistics.mean(counts):.1f} of {experts} experts a module "
        f"(fewest {min(counts)}, most {max(counts)})"
    )
