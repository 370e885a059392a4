"""How the chosen experts are applied. A kernel is a function; all kernels give the same result as `eager`."""

from __future__ import annotations

import logging
from functools import cache

import torch

from .eager import eager
from .folded import folded
from .stack import ExpertBank, ExpertStack


logger = logging.getLogger(__name__)

KERNELS = {
    "eager": eager,
    "folded": folded,
}

AGGREGATIONS = ("output", "parameter")


def check_kernel(name: str) -> str:
    """Return `name` if it is `"auto"` or a kernel; raise a `ValueError` that lists what is allowed otherwise."""
    if name != "auto" and name not in KERNELS:
        raise ValueError(f"kernel={name!r} is unknown; allowed are 'auto', {', '.join(map(repr, KERNELS))}.")
    return name


def select_kernel(name: str) -> str:
    """The kernel that runs for a requested name. `"auto"` takes `folded`, which no measured case loses to `eager`."""
    return "folded" if name == "auto" else name


@cache
def log_choice(name: str) -> None:
    """Say once what `"auto"` stands for; not in the forward, where a log call would break a compiled graph."""
    if name == "auto":
        logger.info("kernel='auto' chose %r.", select_kernel(name))


def routed_lora(
    x_TI: torch.Tensor, stack: ExpertStack, weights_TE: torch.Tensor, *, aggregation: str, kernel: str
) -> torch.Tensor:
    """Apply the routed experts of one layer.

    Args:
        x_TI (`torch.Tensor`): layer inputs (T, I) in the dtype of the factors.
        stack (`ExpertStack`): the experts of the layer.
        weights_TE (`torch.Tensor`): float32 (T, E) routing weights, 0 where an expert is not chosen.
        aggregation (`str`): `"output"` or `"parameter"`, see `eager`.
        kernel (`str`): a key of `KERNELS`, or `"auto"`.

    Returns:
        `torch.Tensor`: the sum of the weighted expert outputs, (T, O).
    """
    return KERNELS[select_kernel(kernel)](x_TI, stack, weights_TE, aggregation)


__all__ = [
    "AGGREGATIONS",
    "KERNELS",
    "ExpertBank",
    "ExpertStack",
    "check_kernel",
    "log_choice",
    "routed_lora",
    "select_kernel",
]
