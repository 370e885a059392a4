"""From router logits to chosen experts: what all routers share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch


GRANULARITIES = ("token", "sequence")


@dataclass(frozen=True)
class Routing:
    """The experts that each token of one layer goes to.

    Args:
        top_k_index (`torch.Tensor`):
            int64 (T, K), positions among the E experts of the layer; E is the null expert (the bare base), -1 nothing.
        top_k_weights (`torch.Tensor`): float32 (T, K), 0 where the index is -1.
    """

    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor

    def detach(self) -> Routing:
        """The same without a graph."""
        return Routing(self.top_k_index, self.top_k_weights.detach())

    def rows(self, repeats: int) -> Routing:
        """Each row `repeats` times in a row: from one decision a sequence to one a token."""
        if repeats == 1:
            return self
        index_TK = self.top_k_index.repeat_interleave(repeats, dim=0)
        return Routing(index_TK, self.top_k_weights.repeat_interleave(repeats, dim=0))


@dataclass(frozen=True)
class Selection:
    """How experts are chosen by their logits; the same options on every router.

    Args:
        top_k (`int`): experts kept for a token; more than there are means all of them.
        temperature (`float`): divides the kept logits before the softmax over them.
        top_p (`float`, *optional*): of the kept, the fewest whose weights sum to at least this; 0 < p <= 1.
        granularity (`str`): `"token"`, or `"sequence"`: one choice a request, from the tokens of its first call.
        tied (`bool`): modules that share an input (q, k, v; gate, up) decide together, by their mean logits.
        null_expert (`float`, *optional*): the logit of one more candidate that adds nothing to the base.
        masked_experts (`tuple[str, ...]`): names of experts that are never chosen.
        calibrated (`bool`): logits are standardised by mean and spread per expert and module.

    Raises:
        ValueError: a value outside what is allowed; the message says what is.
    """

    top_k: int = 4
    temperature: float = 1.0
    top_p: float | None = None
    granularity: str = "token"
    tied: bool = False
    null_expert: float | None = None
    masked_experts: tuple[str, ...] = ()
    calibrated: bool = False

    def __post_init__(self) -> None:
        check_top_k(self.top_k)
        check_temperature(self.temperature)
        if self.top_p is not None and not (_is_finite(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p={self.top_p!r} is not allowed; it is None, or above 0 and at most 1.")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity={self.granularity!r} is unknown; allowed are {list(GRANULARITIES)}.")
        if self.null_expert is not None and not _is_finite(self.null_expert):
            raise ValueError(
                f"null_expert={self.null_expert!r} is not allowed; it is None, or the router logit of the base, a "
                "finite number."
            )
        for name in ("tied", "calibrated"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed; it is True or False.")
        if isinstance(self.masked_experts, str) or not all(isinstance(name, str) for name in self.masked_experts):
            raise ValueError(f"masked_experts={self.masked_experts!r} is not allowed; it is a list of expert names.")


def select(
    logits_TE: torch.Tensor,
    selection: Selection,
    *,
    allowed_E: torch.Tensor | None = None,
    keep_all: bool = False,
    equal: bool = False,
) -> Routing:
    """Keep the `top_k` largest logits of each token; their softmax at the temperature gives the weights.

    The largest logit is subtracted before the division, so that a temperature near 0 ends in the argmax, not in
    overflow (arXiv 2405.11157, Algorithm 2: softmax over the kept logits only).

    Args:
        logits_TE (`torch.Tensor`): float32 (T, E).
        selection (`Selection`): the options.
        allowed_E (`torch.Tensor`, *optional*): bool (E,), False for an expert that is masked.
        keep_all (`bool`): whether `top_k` is ignored.
        equal (`bool`): whether the kept experts get equal weights instead of the softmax.
    """
    if allowed_E is not None:
        logits_TE = logits_TE.masked_fill(~allowed_E, -math.inf)
    if selection.null_expert is not None:
        null_T1 = torch.full_like(logits_TE[:, :1], selection.null_expert)
        logits_TE = torch.cat([logits_TE, null_T1], dim=-1)
    is_plain = allowed_E is None and selection.null_expert is None and selection.top_p is None
    if keep_all:
        index_TK = torch.arange(logits_TE.shape[-1], device=logits_TE.device).expand(logits_TE.shape)
        top_TK, highest_T1 = logits_TE, logits_TE.amax(-1, keepdim=True)
    else:
        top_TK, index_TK = torch.topk(logits_TE, min(selection.top_k, logits_TE.shape[-1]), dim=-1)
        highest_T1 = top_TK[:, :1]
    if equal:
        top_TK = torch.where(top_TK == -math.inf, top_TK, highest_T1)
    temperature = max(selection.temperature, torch.finfo(torch.float32).tiny)
    if is_plain:
        return Routing(index_TK, torch.softmax((top_TK - highest_T1) / temperature, dim=-1))
    dropped_TK = top_TK == -math.inf
    # a token whose candidates are all masked has no largest logit, and nothing is kept for it
    gaps_TK = torch.where(dropped_TK, -math.inf, top_TK - torch.where(highest_T1 == -math.inf, 0.0, highest_T1))
    weights_TK = torch.softmax(gaps_TK / temperature, dim=-1).nan_to_num(0.0)
    if selection.top_p is not None:
        weights_TK = _nucleus(weights_TK, selection.top_p)
        dropped_TK = dropped_TK | (weights_TK == 0)
    return Routing(torch.where(dropped_TK, -1, index_TK), weights_TK)


def _nucleus(weights_TK: torch.Tensor, top_p: float) -> torch.Tensor:
    """The largest weights whose sum reaches `top_p`, at least one a token, scaled to sum 1; the others 0."""
    sorted_TK, order_TK = weights_TK.sort(dim=-1, descending=True, stable=True)
    before_TK = sorted_TK.cumsum(-1) - sorted_TK
    kept_TK = torch.where(before_TK < top_p, sorted_TK, 0.0)
    kept_TK = kept_TK / kept_TK.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.zeros_like(weights_TK).scatter(1, order_TK, kept_TK)


def check_top_k(top_k: Any) -> int:
    """Return `top_k` as an int if it is a whole number of at least 1; raise a `ValueError` otherwise."""
    if isinstance(top_k, bool) or not isinstance(top_k, Integral) or top_k < 1:
        raise ValueError(f"top_k={top_k!r} is not allowed; it must be a whole number of at least 1.")
    return int(top_k)


def check_temperature(router_temperature: Any) -> float:
    """Return the temperature as a float if it is positive and finite; raise a `ValueError` otherwise."""
    if not _is_finite(router_temperature) or router_temperature <= 0:
        raise ValueError(
            f"router_temperature={router_temperature!r} is not allowed; it must be a positive, finite number."
        )
    return float(router_temperature)


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
