"""The Triton kernels of `triton_routing.py`: scores |x . v| and the choice of the largest."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _choose(
    dots_TE,
    t,
    tokens,
    experts,
    temperature,
    index_TK,
    weights_TK,
    signs_TK,
    NUM_CHOSEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write the largest |dots| of each token, their softmax at the temperature, and the signs of the dots."""
    e, k = tl.arange(0, dots_TE.shape[1])[None, :], tl.arange(0, BLOCK_K)[None, :]
    scores_TE = tl.where(e < experts, tl.abs(dots_TE), -float("inf"))
    top_TK = tl.full((dots_TE.shape[0], BLOCK_K), -float("inf"), dtype=tl.float32)
    chosen_TK = tl.zeros((dots_TE.shape[0], BLOCK_K), dtype=tl.int32)
    sign_TK = tl.zeros((dots_TE.shape[0], BLOCK_K), dtype=tl.float32)
    for i in range(NUM_CHOSEN):
        at_T1 = tl.argmax(scores_TE, 1)[:, None]
        is_at_TE = e == at_T1
        dot_T1 = tl.sum(tl.where(is_at_TE, dots_TE, 0.0), 1)[:, None]
        top_TK = tl.where(k == i, tl.max(scores_TE, 1)[:, None], top_TK)
        # where inputs are not numbers no score is the largest, and an index past the last would be read by kernels
        chosen_TK = tl.where(k == i, tl.minimum(at_T1, experts - 1), chosen_TK)
        sign_TK = tl.where(k == i, tl.where(dot_T1 > 0, 1.0, tl.where(dot_T1 < 0, -1.0, 0.0)), sign_TK)
        scores_TE = tl.where(is_at_TE, -float("inf"), scores_TE)
    raised_TK = tl.where(k < NUM_CHOSEN, tl.exp((top_TK - tl.max(top_TK, 1)[:, None]) / temperature), 0.0)
    place_TK = t[:, None] * NUM_CHOSEN + k
    is_TK = (t < tokens)[:, None] & (k < NUM_CHOSEN)
    tl.store(index_TK + place_TK, chosen_TK.to(tl.int64), mask=is_TK)
    tl.store(weights_TK + place_TK, raised_TK / tl.sum(raised_TK, 1)[:, None], mask=is_TK)
    tl.store(signs_TK + place_TK, sign_TK, mask=is_TK)


@triton.jit
def _score_few(
    dots_TE,
    x_TI,
    prototypes_EI,
    index_TK,
    weights_TK,
    signs_TK,
    tokens,
    experts,
    features,
    temperature,
    NUM_CHOSEN: tl.constexpr,
    CHOOSES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Program (token, experts): x . v of them, written; where `CHOOSES` all experts are here, and the choice is."""
    t = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    sums_EI = tl.zeros((BLOCK_E, BLOCK_I), dtype=tl.float32)
    for start in range(0, features, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        x_I = tl.load(x_TI + t * features + i, mask=i < features, other=0.0).to(tl.float32)
        is_EI = (e < experts)[:, None] & (i < features)[None, :]
        sums_EI += x_I[None, :] * tl.load(prototypes_EI + e[:, None] * features + i[None, :], mask=is_EI, other=0.0)
    dots_E = tl.sum(sums_EI, 1)
    if CHOOSES:
        ts = t + tl.arange(0, 1)
        _choose(dots_E[None, :], ts, tokens, experts, temperature, index_TK, weights_TK, signs_TK, NUM_CHOSEN, BLOCK_K)
    else:
        tl.store(dots_TE + t * experts + e, dots_E, mask=e < experts)


@triton.jit
def _score_many(
    dots_TE,
    x_TI,
    prototypes_EI,
    tokens,
    experts,
    features,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Program (tokens, experts): x . v."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    sums_TE = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
    for start in range(0, features, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        is_TI = (t < tokens)[:, None] & (i < features)[None, :]
        x = tl.load(x_TI + t[:, None] * features + i[None, :], mask=is_TI, other=0.0).to(tl.float32)
        is_IE = (i < features)[:, None] & (e < experts)[None, :]
        v_IE = tl.load(prototypes_EI + e[None, :] * features + i[:, None], mask=is_IE, other=0.0)
        sums_TE = tl.dot(x, v_IE, sums_TE, input_precision=PRECISION)
    is_TE = (t < tokens)[:, None] & (e < experts)[None, :]
    tl.store(dots_TE + t[:, None] * experts + e[None, :], sums_TE, mask=is_TE)


@triton.jit
def _choose_many(
    dots_TE,
    index_TK,
    weights_TK,
    signs_TK,
    tokens,
    experts,
    temperature,
    NUM_CHOSEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Program (tokens): the choice among dots that are there."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    is_TE = (t < tokens)[:, None] & (e < experts)[None, :]
    dots = tl.load(dots_TE + t[:, None] * experts + e[None, :], mask=is_TE, other=0.0)
    _choose(dots, t, tokens, experts, temperature, index_TK, weights_TK, signs_TK, NUM_CHOSEN, BLOCK_K)
