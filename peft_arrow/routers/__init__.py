"""Which experts a token gets. One file a router, one row in `ROUTERS`."""

from __future__ import annotations

import math
from numbers import Integral, Real

from .arrow import ArrowRouter
from .base import Router, Routing, select
from .prototypes import top_right_singular_vectors
from .uniform import UniformRouter


ROUTERS: dict[str, type[Router]] = {
    "arrow": ArrowRouter,
    "uniform": UniformRouter,
}


def check_router(name: str) -> str:
    """Return `name` if a router has it; raise a `ValueError` that lists the routers otherwise."""
    if name not in ROUTERS:
        raise ValueError(f"router={name!r} is unknown; allowed are {', '.join(map(repr, ROUTERS))}.")
    return name


def check_top_k(top_k: int) -> int:
    """Return `top_k` as an int if it is a whole number of at least 1; raise a `ValueError` otherwise."""
    if isinstance(top_k, bool) or not isinstance(top_k, Integral) or top_k < 1:
        raise ValueError(f"top_k={top_k!r} is not allowed; it must be a whole number of at least 1.")
    return int(top_k)


def check_temperature(router_temperature: float) -> float:
    """Return the temperature as a float if it is positive and finite; raise a `ValueError` otherwise."""
    is_number = isinstance(router_temperature, Real) and not isinstance(router_temperature, bool)
    if not is_number or not math.isfinite(router_temperature) or router_temperature <= 0:
        raise ValueError(
            f"router_temperature={router_temperature!r} is not allowed; it must be a positive, finite number."
        )
    return float(router_temperature)


def make_router(name: str, top_k: int, router_temperature: float) -> Router:
    """The router of that name with checked settings."""
    return ROUTERS[check_router(name)](check_top_k(top_k), check_temperature(router_temperature))


__all__ = [
    "ROUTERS",
    "Router",
    "Routing",
    "check_router",
    "check_temperature",
    "check_top_k",
    "make_router",
    "select",
    "top_right_singular_vectors",
]
