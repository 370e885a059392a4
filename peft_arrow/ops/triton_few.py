"""Operators for few assignments: factors are read by index, nothing is sorted, and two launches serve a bank.

They have no gradients: they are for inference.
"""

from __future__ import annotations

import torch

from .triton_launch import (
    FEW_CHOSEN_RANKS,
    FEW_FEATURES,
    FEW_OUTPUTS,
    FEW_RANKS,
    ceil_div,
    kernels,
    launch,
    power_of_two,
    sum_dtype,
)


def shrink_few(
    x_TI: torch.Tensor,
    lora_A: torch.Tensor,
    index_TK: torch.Tensor,
    columns_MW: torch.Tensor,
    local_E: torch.Tensor | None,
    is_ragged: bool,
    parts: int,
) -> torch.Tensor:
    """A_m x of every assignment, in parts of the features: (parts, T, K, W), 0 for no expert of the bank."""
    z_PTKW = room_for_parts(x_TI, lora_A, index_TK, columns_MW, local_E, is_ragged, parts)
    (tokens, features), num_chosen, (rows, widest) = x_TI.shape, index_TK.shape[1], columns_MW.shape
    block = min(power_of_two(widest), FEW_RANKS)
    launch(
        kernels("triton_kernels")._shrink_few,
        (tokens * num_chosen, ceil_div(widest, block), parts),
        z_PTKW,
        x_TI.contiguous(),
        lora_A,
        index_TK.contiguous(),
        local_E,
        columns_MW,
        features,
        rows - 1,
        0 if local_E is None else local_E.shape[0] - 2,
        *lora_A.stride(),
        NUM_CHOSEN=num_chosen,
        WIDEST=widest,
        IS_RAGGED=is_ragged,
        PART=ceil_div(ceil_div(features, parts), FEW_FEATURES) * FEW_FEATURES,
        BLOCK_R=block,
        BLOCK_N=FEW_FEATURES,
    )
    return z_PTKW


def room_for_parts(
    x_TI: torch.Tensor,
    lora_A: torch.Tensor,
    index_TK: torch.Tensor,
    columns_MW: torch.Tensor,
    local_E: torch.Tensor | None,
    is_ragged: bool,
    parts: int,
) -> torch.Tensor:
    """What `shrink_few` returns, without values; arguments as there."""
    return x_TI.new_empty((parts, *index_TK.shape, columns_MW.shape[1]), dtype=sum_dtype(x_TI.dtype))


def expand_few(
    y_TN: torch.Tensor,
    z_PTKW: torch.Tensor,
    weights_TK: torch.Tensor | None,
    scaling_MW: torch.Tensor | None,
    factor: torch.Tensor,
    rank_dim: int,
    index_TK: torch.Tensor,
    columns_MW: torch.Tensor,
    local_E: torch.Tensor | None,
    is_ragged: bool,
    is_added: bool,
) -> None:
    """Write the sum of the experts' outputs to `y_TN` (T, N), or add it where `is_added`.

    `rank_dim` is the dimension of `factor` that is its rank. Without weights z counts as it is.
    """
    parts, tokens, num_chosen, widest = z_PTKW.shape
    features = y_TN.shape[1]
    block_R = min(power_of_two(widest), FEW_CHOSEN_RANKS)
    block_N = FEW_OUTPUTS if tokens > 1 else FEW_OUTPUTS // 2
    launch(
        kernels("triton_kernels")._expand_few,
        (tokens, ceil_div(features, block_N)),
        y_TN,
        z_PTKW,
        None if weights_TK is None else weights_TK.contiguous(),
        factor,
        index_TK.contiguous(),
        local_E,
        columns_MW,
        scaling_MW,
        features,
        columns_MW.shape[0] - 1,
        0 if local_E is None else local_E.shape[0] - 2,
        y_TN.stride(0),
        factor.stride(rank_dim),
        factor.stride(1 - rank_dim),
        NUM_CHOSEN=num_chosen,
        WIDEST=widest,
        IS_RAGGED=is_ragged,
        IS_ADDED=is_added,
        PARTS=parts,
        BLOCK_K=min(power_of_two(num_chosen), FEW_CHOSEN_RANKS // block_R),
        BLOCK_R=block_R,
        BLOCK_N=block_N,
    )
