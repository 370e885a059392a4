"""Which experts a token gets. One file a rule, one row in `ROUTERS`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from .arrow import ArrowRouter
from .base import LayerInput, Option, Router
from .centroid import CentroidRouter
from .lag import LagRouter
from .phatgoose import PhatgooseRouter
from .pinned import OracleRouter, PinnedRouter
from .prompt_level import RetrievalRouter, TaskPredictorRouter
from .prototypes import top_right_singular_vectors
from .random import RandomRouter
from .selection import Routing, Selection, select
from .spectr import NormRouter, SpectrRouter
from .uniform import UniformRouter


ROUTERS: dict[str, type[Router]] = {
    "arrow": ArrowRouter,
    "uniform": UniformRouter,
    "random": RandomRouter,
    "pinned": PinnedRouter,
    "oracle": OracleRouter,
    "spectr": SpectrRouter,
    "norm": NormRouter,
    "lag": LagRouter,
    "centroid": CentroidRouter,
    "task_predictor": TaskPredictorRouter,
    "phatgoose": PhatgooseRouter,
    "retrieval": RetrievalRouter,
}
SELECTION_FIELDS = tuple(f.name for f in fields(Selection))


def check_router(name: str) -> str:
    """Return `name` if a router has it; raise a `ValueError` that lists the routers otherwise."""
    if not isinstance(name, str) or name not in ROUTERS:
        raise ValueError(f"router={name!r} is unknown; allowed are {', '.join(map(repr, ROUTERS))}.")
    return name


def make_router(name: str, selection: Selection | None = None, **options: Any) -> Router:
    """The router of that name.

    Args:
        name (`str`): a key of `ROUTERS`.
        selection (`Selection`, *optional*): how experts are chosen by their logits.
        options: the router's own, see its `options`.

    Raises:
        ValueError: an unknown name or option, or a value outside what is allowed.
    """
    return ROUTERS[check_router(name)](selection, **options)


__all__ = [
    "ROUTERS",
    "SELECTION_FIELDS",
    "LayerInput",
    "Option",
    "Router",
    "Routing",
    "Selection",
    "check_router",
    "make_router",
    "select",
    "top_right_singular_vectors",
]
