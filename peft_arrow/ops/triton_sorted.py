"""Operators for assignments sorted by expert: chunks of one expert each are tiles of matmuls. With gradients.

Outputs are made a row an assignment and then summed a token at a time, in float32 and always in one order, so that no
two runs differ. That writes K times the result. Of the two ways without such rows one gathers each token's factors,
which reads T x K of them through the cache; the other multiplies all experts of a block of tokens, which is nearly all
experts where they are few and nearly T x K where they are many. The gradient of a factor is summed by one program over
the assignments of an expert, in their order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .stack import ExpertBank, local_index
from .triton_launch import (
    ceil_div,
    chunk_rows,
    feature_block,
    kernels,
    launch,
    power_of_two,
    rank_block,
    ranks_differ,
    sum_dtype,
)


# Bytes of rows that are not summed yet: outputs are made for so many features at a time.
ROW_BYTES = 2**27


class Sorted(NamedTuple):
    """The assignments of the tokens to the experts of one bank, sorted by expert; S = T x K.

    Args:
        tables (`list[torch.Tensor]`):
            int64 (T, K) positions in the layer; int64 (S,) the assignments in order of their expert; int32 (M,) where
            each expert's end in it; int32 (C, 3) chunks: expert, begin, and where the expert's end; int64 (M + 1, W)
            the columns of each expert; where the bank has not all experts, int64 (E + 2,) the positions in the bank.
        is_ragged (`bool`): whether ranks differ.
        rows (`int`): the most assignments of a chunk.
    """

    tables: list[torch.Tensor]
    is_ragged: bool
    rows: int


def sort_assignments(
    bank: ExpertBank, index_TK: torch.Tensor, cut: Callable[[torch.Tensor, int, int], torch.Tensor]
) -> Sorted:
    """Sort by expert, without waiting for the device; what is no expert of the bank comes last and in no chunk.

    `cut` is `cut_chunks`, or the operator made of it.
    """
    members, tables = len(bank.experts), bank.constants
    # a sort takes a pass for every few bits
    dtype = torch.int16 if members < torch.iinfo(torch.int16).max else torch.int32
    local_S = local_index(bank, index_TK).flatten().remainder(members + 1).to(dtype)
    sorted_S, order_S = torch.sort(local_S, stable=True)
    places_M = torch.arange(members, device=index_TK.device, dtype=dtype)
    ends_M = torch.searchsorted(sorted_S, places_M, right=True, out_int32=True)
    rows = chunk_rows(order_S.shape[0], members)
    chunks_C3 = cut(ends_M, order_S.shape[0], rows)
    local = [] if tables.local_E is None else [tables.local_E]
    listed = [index_TK.contiguous(), order_S, ends_M, chunks_C3, tables.columns_MR, *local]
    return Sorted(listed, ranks_differ(bank), rows)


def cut_chunks(ends_M: torch.Tensor, assignments: int, rows: int) -> torch.Tensor:
    """int32 (C, 3): as many chunks as there can be, the unused ones empty."""
    members = ends_M.shape[0]
    chunks_C3 = room_for_chunks(ends_M, assignments, rows)
    launch(
        kernels("triton_sorted_kernels")._cut_chunks,
        (chunks_C3.shape[0],),
        chunks_C3,
        ends_M,
        members,
        BLOCK_S=rows,
        BLOCK_M=power_of_two(members),
    )
    return chunks_C3


def room_for_chunks(ends_M: torch.Tensor, assignments: int, rows: int) -> torch.Tensor:
    """What `cut_chunks` returns, without values."""
    return ends_M.new_empty((min(assignments, assignments // rows + ends_M.shape[0]), 3))


def shrink_sorted(
    x_TN: torch.Tensor, factor: torch.Tensor, rank_dim: int, tables: list[torch.Tensor], is_ragged: bool, rows: int
) -> torch.Tensor:
    """Inner products of each assignment's input and its expert's factor, (T, K, W); 0 for no expert of the bank."""
    index_TK, order_S, _, chunks_C3, columns_MW, *_ = tables
    widest, features = columns_MW.shape[1], x_TN.shape[1]
    z_TKW = x_TN.new_zeros((*index_TK.shape, widest), dtype=sum_dtype(x_TN.dtype))
    launch(
        kernels("triton_sorted_kernels")._shrink_sorted,
        (chunks_C3.shape[0], ceil_div(widest, rank_block(widest))),
        z_TKW,
        x_TN.contiguous(),
        factor,
        order_S,
        chunks_C3,
        columns_MW,
        features,
        factor.stride(rank_dim),
        factor.stride(1 - rank_dim),
        NUM_CHOSEN=index_TK.shape[1],
        WIDEST=widest,
        IS_RAGGED=is_ragged,
        BLOCK_S=rows,
        BLOCK_R=rank_block(widest),
        BLOCK_N=feature_block(x_TN.dtype, widest),
    )
    return z_TKW


def expand_sorted(
    z_TKW: torch.Tensor, factor: torch.Tensor, rank_dim: int, tables: list[torch.Tensor], is_ragged: bool, rows: int
) -> torch.Tensor:
    """The sum over each token's assignments of z times its expert's factor, (T, N)."""
    y_TN = factor.new_empty((z_TKW.shape[0], factor.shape[1 - rank_dim]))
    _write_sorted(y_TN, z_TKW, factor, rank_dim, Sorted(tables, is_ragged, rows), False)
    return y_TN


def add_sorted(
    y_TN: torch.Tensor,
    z_TKW: torch.Tensor,
    factor: torch.Tensor,
    rank_dim: int,
    tables: list[torch.Tensor],
    is_ragged: bool,
    rows: int,
) -> None:
    """Add what `expand_sorted` returns to `y_TN` in place; without gradients."""
    _write_sorted(y_TN, z_TKW, factor, rank_dim, Sorted(tables, is_ragged, rows), True)


def _write_sorted(y_TN, z_TKW, factor, rank_dim, by_expert, is_added) -> None:
    tokens, num_chosen, widest = z_TKW.shape
    features, block = y_TN.shape[1], feature_block(factor.dtype, widest)
    fitting = ROW_BYTES // (tokens * num_chosen * factor.element_size()) // block * block
    width = min(max(fitting, block), features)
    y_SN = factor.new_empty((tokens * num_chosen, width))
    for start in range(0, features, width):
        size = min(width, features - start)
        part = factor.narrow(1 - rank_dim, start, size)
        _expand_part(y_SN, z_TKW.contiguous(), part, rank_dim, by_expert, size)
        _combine_part(y_TN.narrow(1, start, size), y_SN, by_expert, sum_dtype(factor.dtype), is_added)


def _expand_part(y_SN, z_TKW, factor, rank_dim, by_expert, features) -> None:
    _, order_S, _, chunks_C3, columns_MW, *_ = by_expert.tables
    block = feature_block(factor.dtype, columns_MW.shape[1])
    launch(
        kernels("triton_sorted_kernels")._expand_sorted,
        (chunks_C3.shape[0], ceil_div(features, block)),
        y_SN,
        z_TKW,
        factor,
        order_S,
        chunks_C3,
        columns_MW,
        features,
        factor.stride(rank_dim),
        factor.stride(1 - rank_dim),
        WIDEST=columns_MW.shape[1],
        IS_RAGGED=by_expert.is_ragged,
        BLOCK_S=by_expert.rows,
        BLOCK_R=rank_block(columns_MW.shape[1]),
        BLOCK_N=block,
    )


def _combine_part(y_TN, y_SN, by_expert, dtype, is_added) -> None:
    index_TK, _, ends_M, _, _, *local = by_expert.tables
    module = kernels("triton_sorted_kernels")
    tokens, features = y_TN.shape
    launch(
        module._combine,
        (ceil_div(tokens, 4), ceil_div(features, 256)),
        y_TN,
        y_SN,
        index_TK,
        local[0] if local else None,
        tokens,
        features,
        ends_M.shape[0],
        local[0].shape[0] - 2 if local else 0,
        y_TN.stride(0),
        NUM_CHOSEN=index_TK.shape[1],
        IS_ADDED=is_added,
        SUM=module.tl.float64 if dtype == torch.float64 else module.tl.float32,
        BLOCK_T=4,
        BLOCK_N=256,
    )


def outer_sorted(
    x_TN: torch.Tensor,
    z_TKW: torch.Tensor,
    factor: torch.Tensor,
    rank_dim: int,
    tables: list[torch.Tensor],
    is_ragged: bool,
    rows: int,
) -> torch.Tensor:
    """The sum over each expert's assignments of z x^T, in the shape and dtype of `factor`."""
    index_TK, order_S, ends_M, _, columns_MW, *_ = tables
    widest, features = columns_MW.shape[1], x_TN.shape[1]
    block = feature_block(x_TN.dtype, widest)
    grad = torch.empty_like(factor)
    launch(
        kernels("triton_sorted_kernels")._outer_sorted,
        (ends_M.shape[0], ceil_div(features, block), ceil_div(widest, rank_block(widest))),
        grad,
        x_TN.contiguous(),
        z_TKW.contiguous(),
        order_S,
        ends_M,
        columns_MW,
        features,
        grad.stride(rank_dim),
        grad.stride(1 - rank_dim),
        NUM_CHOSEN=index_TK.shape[1],
        WIDEST=widest,
        IS_RAGGED=is_ragged,
        BLOCK_S=32,
        BLOCK_R=rank_block(widest),
        BLOCK_N=block,
    )
    return grad
