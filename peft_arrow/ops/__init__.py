"""How the chosen experts are applied. A kernel is a function; all kernels give the same result as `eager`."""

from __future__ import annotations

import logging
from functools import cache

import torch

from .eager import eager
from .folded import folded, folded_gated
from .gather import gather, gather_gated
from .grouped import grouped
from .scoring import ScoringIndex, full_scores, scores_in_two_stages, scoring_index, top_k_in_two_stages
from .sparse import is_for_sparse, is_sparse, shrink_token, sparse, sparse_gated
from .sparse_calls import bagged
from .stack import BankConstants, ExpertBank, ExpertStack, bank_constants, is_materialised
from .triton import triton


logger = logging.getLogger(__name__)

KERNELS = {
    "eager": eager,
    "folded": folded,
    "gather": gather,
    "grouped": grouped,
    "sparse": sparse,
    "triton": triton,
}

AGGREGATIONS = ("output", "parameter")

# Measured, see docs/kernels.md: up to this sum of ranks all experts at once are cheapest ...
FOLDED_RANK = 64
# ... and where there are not more than this many times the chosen experts; with gradients and without.
FOLDED_SHARE = {True: 8, False: 3}
# Ranks of chosen experts in a call up to which their factors are copied for each token, where `sparse` cannot run.
GATHERED_RANK = 128


def check_kernel(name: str) -> str:
    """Return `name` if it is `"auto"` or a kernel; raise a `ValueError` that lists what is allowed otherwise."""
    if name != "auto" and name not in KERNELS:
        raise ValueError(f"kernel={name!r} is unknown; allowed are 'auto', {', '.join(map(repr, KERNELS))}.")
    return name


def select_kernel(name: str, x_TI: torch.Tensor, stack: ExpertStack, num_chosen: int) -> str:
    """The kernel that runs for a requested name. `"auto"` goes by the crossovers that docs/kernels.md shows.

    Args:
        name (`str`): a key of `KERNELS`, or `"auto"`.
        x_TI (`torch.Tensor`): layer inputs (T, I).
        stack (`ExpertStack`): the experts.
        num_chosen (`int`): K.
    """
    if name != "auto":
        return name
    if folds(stack, num_chosen, torch.is_grad_enabled()) or not stack.is_whole():
        return "folded"
    if is_sparse(x_TI, stack) and stack.lies_by_expert():
        return "sparse"
    return "gather" if gathers(x_TI.shape[0], num_chosen * stack.rank / stack.num_experts) else "grouped"


def folds(stack: ExpertStack, num_chosen: int, has_gradients: bool) -> bool:
    """Whether computing all experts is cheapest, whatever the number of tokens."""
    return stack.rank <= FOLDED_RANK or num_chosen * FOLDED_SHARE[has_gradients] >= stack.num_experts


def gathers(tokens: int, chosen_rank: float) -> bool:
    """Whether copying the chosen experts' factors for each token is cheapest; `chosen_rank`: theirs, for a token."""
    return tokens * chosen_rank <= GATHERED_RANK


@cache
def log_choice(name: str) -> None:
    """Say once what `"auto"` stands for; not in the forward, where a log call would break a compiled graph."""
    if name == "auto":
        logger.info("kernel='auto' chooses among 'folded', 'gather', 'sparse', 'grouped' by tokens and ranks.")


def routed_lora(
    x_TI: torch.Tensor,
    stack: ExpertStack,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    *,
    aggregation: str,
    kernel: str,
    onto_TO: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply the routed experts of one layer.

    Args:
        x_TI (`torch.Tensor`): layer inputs (T, I) in the dtype of the factors.
        stack (`ExpertStack`): the experts of the layer.
        index_TK (`torch.Tensor`):
            int64 (T, K), chosen experts by position in the layer, each at most once a token; -1 and E stand for none.
        weights_TK (`torch.Tensor`): float32 (T, K).
        aggregation (`str`): `"output"` or `"parameter"`, see `eager`.
        kernel (`str`): a key of `KERNELS`, or `"auto"`.
        onto_TO (`torch.Tensor`, *optional*):
            (T, O), what the result is added to in place and returned; only where no gradient is needed.

    Returns:
        `torch.Tensor`: the sum of the weighted expert outputs, (T, O).
    """
    chosen = select_kernel(kernel, x_TI, stack, index_TK.shape[1])
    return KERNELS[chosen](x_TI, stack, index_TK, weights_TK, aggregation, onto_TO)


__all__ = [
    "AGGREGATIONS",
    "FOLDED_RANK",
    "KERNELS",
    "BankConstants",
    "ExpertBank",
    "ExpertStack",
    "ScoringIndex",
    "bagged",
    "bank_constants",
    "check_kernel",
    "folded_gated",
    "folds",
    "full_scores",
    "gather_gated",
    "gathers",
    "is_for_sparse",
    "is_materialised",
    "log_choice",
    "routed_lora",
    "scores_in_two_stages",
    "scoring_index",
    "select_kernel",
    "shrink_token",
    "sparse_gated",
    "top_k_in_two_stages",
]
