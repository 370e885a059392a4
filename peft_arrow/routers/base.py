"""The contract of a router: what it may look at in a layer, and router logits out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar, Protocol

import torch

from .selection import Routing, Selection, select


class LayerInput(Protocol):
    """What a router may look at: one layer in one call.

    Attributes:
        x_TI (`torch.Tensor`): layer inputs (T, I) in the dtype of the base.
        num_experts (`int`): E, the experts that have this module.
        module (`str`): the base's own name of the module.
    """

    x_TI: torch.Tensor
    num_experts: int
    module: str

    def project(self) -> torch.Tensor:
        """x . v_i for the prototype v_i of each expert, float32 (T, E)."""

    def norms(self, kind: str) -> torch.Tensor:
        """Lengths, float32 (T, E): of V_i^T x (`"projection"`), or of s_i B_i A_i x (`"activation"`)."""

    def fitted(self, x_TI: torch.Tensor) -> torch.Tensor:
        """Dot products of `x_TI` with the rows (E, I) that `fit_router` stored for this layer, float32 (T, E)."""


@dataclass(frozen=True)
class Option:
    """An option of one router: its default, and what is allowed: one of a tuple, or a whole number and its least."""

    default: Any
    allowed: tuple | int
    meaning: str = ""

    def check(self, name: str, value: Any) -> Any:
        """Return the value if it is allowed; raise a `ValueError` that says what is."""
        if isinstance(self.allowed, tuple):
            if value not in self.allowed:
                raise ValueError(f"{name}={value!r} is unknown; allowed are {', '.join(map(repr, self.allowed))}.")
        elif isinstance(value, bool) or not isinstance(value, Integral) or value < self.allowed:
            raise ValueError(f"{name}={value!r} is not allowed; it is a whole number of at least {self.allowed}.")
        return value


class Router(ABC):
    """Scores the experts of a layer for every token; the selection is shared by all routers.

    Args:
        selection (`Selection`): how experts are chosen by their logits.
        options: the router's own, see `options`.

    Attributes:
        name (`str`): the key in `ROUTERS`.
        paper (`str`): where the rule is from.
        summary (`str`): what an expert's logit is, in a few words.
        options (`dict[str, Option]`): its own options.
        uses_prototypes (`bool`): whether `project` is called, so that prototypes must be up to date.
        uses_all (`bool`): whether every expert gets a weight, whatever `top_k` says.
        needs_data (`bool`): whether `fit_router` must be called before.
        stores_rows (`bool`): whether it stores a row of the size of the input for each expert and layer.
        is_prompt_level (`bool`): whether one choice is made from the prompt, for all layers of a request.
        is_pinned (`bool`): whether the caller names the experts.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    options: ClassVar[dict[str, Option]] = {}
    uses_prototypes: ClassVar[bool] = False
    uses_all: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False
    stores_rows: ClassVar[bool] = False
    is_prompt_level: ClassVar[bool] = False
    is_pinned: ClassVar[bool] = False

    def __init__(self, selection: Selection | None = None, **options: Any) -> None:
        self.selection = selection or Selection()
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            raise ValueError(
                f"router {self.name!r} has no option {unknown[0]!r}; its own options are {list(self.options)}."
            )
        self.chosen = {
            name: option.check(name, options.get(name, option.default)) for name, option in self.options.items()
        }

    @property
    def top_k(self) -> int:
        """Experts kept for a token."""
        return self.selection.top_k

    @abstractmethod
    def score(self, layer: LayerInput) -> torch.Tensor:
        """Router logits, float32 (T, E)."""

    def choose(self, logits_TE: torch.Tensor, allowed_E: torch.Tensor | None = None) -> Routing:
        """The selection, by the logits; `allowed_E` is False where an expert is masked."""
        equal = self.chosen.get("weights") == "equal"
        return select(logits_TE, self.selection, allowed_E=allowed_E, keep_all=self.uses_all, equal=equal)

    def width(self, num_experts: int) -> int:
        """K: the experts that a token of a module with this many experts can have, the null expert among them."""
        candidates = num_experts + (self.selection.null_expert is not None)
        return candidates if self.uses_all or self.is_pinned else min(self.top_k, candidates)
