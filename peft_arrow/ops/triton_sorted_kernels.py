"""The Triton kernels for assignments that are sorted by expert; letters as in `triton_kernels.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import _columns, _dot, _member


@triton.jit
def _cut_chunks(chunks_C3, ends_M, members, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr):
    """Program c: expert and begin of chunk c of the sorted assignments, and the expert's end; (., 0, 0) past all."""
    c, m = tl.program_id(0), tl.arange(0, BLOCK_M)
    stop_M = tl.load(ends_M + m, mask=m < members, other=0)
    begin_M = tl.load(ends_M + m - 1, mask=(m > 0) & (m < members), other=0)
    chunks_M = (stop_M - begin_M + BLOCK_S - 1) // BLOCK_S
    after_M = tl.cumsum(chunks_M, 0)
    expert = tl.sum((after_M <= c).to(tl.int32), 0)
    begin = tl.sum(tl.where(m == expert, begin_M + (c - after_M + chunks_M) * BLOCK_S, 0), 0)
    stop = tl.sum(tl.where(m == expert, stop_M, 0), 0)
    tl.store(chunks_C3 + c * 3, expert)
    tl.store(chunks_C3 + c * 3 + 1, begin)
    tl.store(chunks_C3 + c * 3 + 2, stop)


@triton.jit
def _shrink_sorted(
    z_SW,
    x_TN,
    factor,
    order_S,
    chunks_C3,
    columns_MW,
    features,
    stride_r,
    stride_n,
    NUM_CHOSEN: tl.constexpr,
    WIDEST: tl.constexpr,
    IS_RAGGED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (chunk, ranks): A_m x of the chunk's assignments."""
    chunk = chunks_C3 + tl.program_id(0) * 3
    m, begin, stop = tl.load(chunk).to(tl.int64), tl.load(chunk + 1), tl.load(chunk + 2)
    if begin >= stop:
        return
    row = begin + tl.arange(0, BLOCK_S)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    column_R, is_R = _columns(columns_MW, m, r, WIDEST, IS_RAGGED)
    s = tl.load(order_S + row, mask=row < stop, other=0)
    x_S = x_TN + (s // NUM_CHOSEN) * features
    sums_SR = tl.zeros((BLOCK_S, BLOCK_R), dtype=z_SW.dtype.element_ty)
    for start in range(0, features, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        is_N = n < features
        x_SN = tl.load(x_S[:, None] + n[None, :], mask=(row < stop)[:, None] & is_N[None, :], other=0.0)
        place_NR = column_R[None, :] * stride_r + n.to(tl.int64)[:, None] * stride_n
        factor_NR = tl.load(factor + place_NR, mask=is_R[None, :] & is_N[:, None], other=0.0)
        sums_SR = _dot(x_SN, factor_NR, sums_SR)
    tl.store(z_SW + s[:, None] * WIDEST + r[None, :], sums_SR, mask=(row < stop)[:, None] & is_R[None, :])


@triton.jit
def _expand_sorted(
    y_SN,
    z_SW,
    factor,
    order_S,
    chunks_C3,
    columns_MW,
    features,
    stride_r,
    stride_n,
    WIDEST: tl.constexpr,
    IS_RAGGED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (chunk, features): B_m z of the chunk's assignments, a row each."""
    chunk = chunks_C3 + tl.program_id(0) * 3
    m, begin, stop = tl.load(chunk).to(tl.int64), tl.load(chunk + 1), tl.load(chunk + 2)
    if begin >= stop:
        return
    row = begin + tl.arange(0, BLOCK_S)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    s = tl.load(order_S + row, mask=row < stop, other=0)
    sums_SN = tl.zeros((BLOCK_S, BLOCK_N), dtype=z_SW.dtype.element_ty)
    for first_r in range(0, WIDEST, BLOCK_R):
        r = first_r + tl.arange(0, BLOCK_R)
        column_R, is_R = _columns(columns_MW, m, r, WIDEST, IS_RAGGED)
        is_SR = (row < stop)[:, None] & is_R[None, :]
        z_SR = tl.load(z_SW + s[:, None] * WIDEST + r[None, :], mask=is_SR, other=0.0)
        place_RN = column_R[:, None] * stride_r + n.to(tl.int64)[None, :] * stride_n
        factor_RN = tl.load(factor + place_RN, mask=is_R[:, None] & (n < features)[None, :], other=0.0)
        sums_SN = _dot(z_SR.to(factor_RN.dtype), factor_RN, sums_SN)
    is_SN = (row < stop)[:, None] & (n < features)[None, :]
    tl.store(y_SN + s[:, None] * features + n[None, :], sums_SN.to(y_SN.dtype.element_ty), mask=is_SN)


@triton.jit
def _combine(
    y_TN,
    y_SN,
    index_S,
    local_E,
    tokens,
    features,
    members,
    num_experts,
    stride_y,
    NUM_CHOSEN: tl.constexpr,
    IS_ADDED: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (tokens, features): the sum of the rows of each token, those of no expert of the bank left out."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_TN = (t < tokens)[:, None] & (n < features)[None, :]
    place_TN = t[:, None] * stride_y + n[None, :]
    sums_TN = tl.zeros((BLOCK_T, BLOCK_N), dtype=SUM)
    for k in range(NUM_CHOSEN):
        s = t * NUM_CHOSEN + k
        m = _member(index_S, local_E, s, t < tokens, num_experts)
        is_here = ((m >= 0) & (m < members))[:, None] & is_TN
        sums_TN += tl.load(y_SN + s[:, None] * features + n[None, :], mask=is_here, other=0.0).to(SUM)
    if IS_ADDED:
        sums_TN += tl.load(y_TN + place_TN, mask=is_TN, other=0.0).to(SUM)
    tl.store(y_TN + place_TN, sums_TN.to(y_TN.dtype.element_ty), mask=is_TN)


@triton.jit
def _outer_sorted(
    grad,
    x_TN,
    z_SW,
    order_S,
    ends_M,
    columns_MW,
    features,
    stride_r,
    stride_n,
    NUM_CHOSEN: tl.constexpr,
    WIDEST: tl.constexpr,
    IS_RAGGED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (expert, features, ranks): the sum of z x^T over the expert's assignments, in their order."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    begin, stop = tl.load(ends_M + m - 1, mask=m > 0, other=0), tl.load(ends_M + m)
    column_R, is_R = _columns(columns_MW, m, r, WIDEST, IS_RAGGED)
    is_N = n < features
    sums_RN = tl.zeros((BLOCK_R, BLOCK_N), dtype=z_SW.dtype.element_ty)
    for start in range(begin, stop, BLOCK_S):
        row = start + tl.arange(0, BLOCK_S)
        is_S = row < stop
        s = tl.load(order_S + row, mask=is_S, other=0)
        z_RS = tl.load(z_SW + s[None, :] * WIDEST + r[:, None], mask=is_R[:, None] & is_S[None, :], other=0.0)
        x_SN = x_TN + (s // NUM_CHOSEN)[:, None] * features + n[None, :]
        x_SN = tl.load(x_SN, mask=is_S[:, None] & is_N[None, :], other=0.0)
        sums_RN = _dot(z_RS.to(x_SN.dtype), x_SN, sums_RN)
    place_RN = column_R[:, None] * stride_r + n.to(tl.int64)[None, :] * stride_n
    tl.store(grad + place_RN, sums_RN.to(grad.dtype.element_ty), mask=is_R[:, None] & is_N[None, :])
