"""The Triton kernels for few assignments, and what all of ours share; importing this file imports triton.

S is the number of assignments: s = t * K + k is slot k of token t. `factor` is the lora_A or the lora_B of a bank,
with the strides of its rank and of its features; N stands for those features, I for lora_A and O for lora_B: one
kernel shrinks in the forward (x A^T) and in the backward (grad y B), and one expands. M is the number of experts of
the bank and W their largest rank: z_SW holds the r numbers of each assignment. Sums are float32, or float64 where
factors are.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl


INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _dot(a, b, sums):
    if INTERPRETED:  # the interpreter would multiply the bits of bfloat16
        a, b = a.to(sums.dtype), b.to(sums.dtype)
    return tl.dot(a, b, sums, input_precision="ieee", out_dtype=sums.dtype)


@triton.jit
def _member(index_S, local_E, s, is_s, num_experts):
    """Positions in the bank of the experts of assignments; what is not in 0..M-1 is no expert of the bank."""
    e = tl.load(index_S + s, mask=is_s, other=-1)
    if local_E is not None:
        e = tl.load(local_E + tl.where(e < 0, num_experts + 1, e))
    return e


@triton.jit
def _columns(columns_MW, m, r, WIDEST: tl.constexpr, IS_RAGGED: tl.constexpr):
    """The columns of experts `m` at places `r` of their ranks, and which of them exist; padding repeats the first."""
    if IS_RAGGED:
        column = tl.load(columns_MW + m * WIDEST) + r
        is_r = tl.load(columns_MW + m * WIDEST + r, mask=r < WIDEST, other=-1) == column
    else:
        column, is_r = m * WIDEST + r, r < WIDEST
    return column, is_r


@triton.jit
def _shrink_few(
    z_PSW,
    x_TN,
    factor,
    index_S,
    local_E,
    columns_MW,
    features,
    members,
    num_experts,
    stride_r,
    stride_n,
    NUM_CHOSEN: tl.constexpr,
    WIDEST: tl.constexpr,
    IS_RAGGED: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (assignment, ranks, part p of the features): that part of A_m x; 0 for no expert of the bank."""
    s, p = tl.program_id(0).to(tl.int64), tl.program_id(2)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    m = _member(index_S, local_E, s, True, num_experts)
    is_here = (m >= 0) & (m < members)
    column_R, is_R = _columns(columns_MW, tl.where(is_here, m, 0), r, WIDEST, IS_RAGGED)
    stop = tl.where(is_here, features, 0)
    sums_RN = tl.zeros((BLOCK_R, BLOCK_N), dtype=z_PSW.dtype.element_ty)
    for start in range(0, PART, BLOCK_N):
        n = p * PART + start + tl.arange(0, BLOCK_N)
        is_N = n < stop
        x_N = tl.load(x_TN + (s // NUM_CHOSEN) * features + n, mask=is_N, other=0.0)
        place_RN = column_R[:, None] * stride_r + n.to(tl.int64)[None, :] * stride_n
        factor_RN = tl.load(factor + place_RN, mask=is_R[:, None] & is_N[None, :], other=0.0)
        sums_RN += factor_RN.to(sums_RN.dtype) * x_N[None, :].to(sums_RN.dtype)
    tl.store(z_PSW + (p * tl.num_programs(0) + s) * WIDEST + r, tl.sum(sums_RN, 1), mask=r < WIDEST)


@triton.jit
def _expand_few(
    y_TN,
    z_PSW,
    weights_S,
    factor,
    index_S,
    local_E,
    columns_MW,
    scaling_MW,
    features,
    members,
    num_experts,
    stride_y,
    stride_r,
    stride_n,
    NUM_CHOSEN: tl.constexpr,
    WIDEST: tl.constexpr,
    IS_RAGGED: tl.constexpr,
    IS_ADDED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (token, features): y = sum_k w_k s_k B_k z_k, z the sum of its parts; w_k s_k is 1 without weights."""
    t, p = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS) * tl.num_programs(0) * NUM_CHOSEN
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums_N = tl.zeros((BLOCK_N,), dtype=z_PSW.dtype.element_ty)
    for first_k in range(0, NUM_CHOSEN, BLOCK_K):
        k = first_k + tl.arange(0, BLOCK_K)
        s = t * NUM_CHOSEN + k
        m = _member(index_S, local_E, s, k < NUM_CHOSEN, num_experts)
        is_K = (m >= 0) & (m < members)
        m = tl.where(is_K, m, 0)
        for first_r in range(0, WIDEST, BLOCK_R):
            r = first_r + tl.arange(0, BLOCK_R)
            column_KR, is_KR = _columns(columns_MW, m[:, None], r[None, :], WIDEST, IS_RAGGED)
            is_KR = is_KR & is_K[:, None]
            place_PKR = (p[:, None, None] + s[None, :, None]) * WIDEST + r[None, None, :]
            z_KR = tl.sum(tl.load(z_PSW + place_PKR, mask=is_KR[None, :, :], other=0.0), 0)
            if weights_S is not None:
                weight_K = tl.load(weights_S + s, mask=is_K, other=0.0)
                z_KR *= (weight_K * tl.load(scaling_MW + m * WIDEST, mask=is_K, other=0.0))[:, None]
            place_KRN = column_KR[:, :, None] * stride_r + n.to(tl.int64)[None, None, :] * stride_n
            is_KRN = is_KR[:, :, None] & (n < features)[None, None, :]
            factor_KRN = tl.load(factor + place_KRN, mask=is_KRN, other=0.0).to(sums_N.dtype)
            sums_N += tl.sum(tl.sum(factor_KRN * z_KR[:, :, None], 1), 0)
    if IS_ADDED:
        sums_N += tl.load(y_TN + t * stride_y + n, mask=n < features, other=0.0).to(sums_N.dtype)
    tl.store(y_TN + t * stride_y + n, sums_N.to(y_TN.dtype.element_ty), mask=n < features)
