"""Every router from its formula, token by token and expert by expert, in float64 numpy.

Shares no function with `peft_arrow`; experts are read by `tests.reference`.
"""

from __future__ import annotations

import math

import numpy as np

from tests.reference import DenseExpert


MASK64 = 2**64 - 1


def arrow(x: np.ndarray, experts: dict[int, DenseExpert]) -> dict[int, float]:
    """|x . v|."""
    return {p: abs(float(x @ e.prototype)) for p, e in experts.items()}


def spectr(x: np.ndarray, experts: dict[int, DenseExpert]) -> dict[int, float]:
    """|V^T x| with all right singular vectors of the dense update."""
    scores = {}
    for p, e in experts.items():
        _, S, Vh = np.linalg.svd(e.B @ e.A)
        V = Vh[: len(S)][S > 1e-6 * S[0]]
        scores[p] = float(np.linalg.norm(V @ x))
    return scores


def norm(x: np.ndarray, experts: dict[int, DenseExpert]) -> dict[int, float]:
    """|s B A x|."""
    return {p: float(np.linalg.norm(e.scaling * (e.B @ (e.A @ x)))) for p, e in experts.items()}


def lag(x: np.ndarray, experts: dict[int, DenseExpert], filter_k: int, score) -> dict[int, float]:
    """The norm of those that Arrow scores highest; the others minus infinity."""
    arrows = arrow(x, experts)
    kept = sorted(arrows, key=arrows.__getitem__, reverse=True)[:filter_k]
    scores = score(x, experts)
    return {p: scores[p] if p in kept else -math.inf for p in experts}


def cosine(x: np.ndarray, rows: dict[int, np.ndarray]) -> dict[int, float]:
    """cos(x, c)."""
    return {p: float(x @ c) / float(np.linalg.norm(x) * np.linalg.norm(c)) for p, c in rows.items()}


def layer_norm(x: np.ndarray) -> np.ndarray:
    """Mean 0, variance 1, with the epsilon that torch adds."""
    return (x - x.mean()) / math.sqrt(x.var() + 1e-5)


def phatgoose(x: np.ndarray, gates: dict[int, np.ndarray]) -> dict[int, float]:
    """LN(x) . LN(g) / sqrt(d)."""
    return {p: float(layer_norm(x) @ layer_norm(g)) / math.sqrt(len(x)) for p, g in gates.items()}


def mix(value: int) -> int:
    """Three rounds of xor-shift and multiply on 64-bit integers."""
    for shift in (30, 27, 31):
        value = ((value ^ (value >> shift)) * 0x2545F4914F6CDD1D) & MASK64
    return value


def random_uniforms(x: np.ndarray, num_experts: int, salt: int) -> list[float]:
    """The uniform numbers behind the random router, from the bits of a float32 input."""
    total = 0
    for place, bits in enumerate(x.astype(np.float32).view(np.int32).tolist(), start=1):
        total = (total + mix((bits + place * 0x2545F4914F6CDD1D) & MASK64)) & MASK64
    start = mix((total + salt * 0x2545F4914F6CDD1D % 2**63) & MASK64)
    draws = [mix((start + e * 0x2545F4914F6CDD1D) & MASK64) for e in range(1, num_experts + 1)]
    return [((draw >> 41) + 0.5) / 2**23 for draw in draws]


def choose(
    scores: dict[int, float],
    top_k: int,
    temperature: float = 1.0,
    *,
    masked: tuple[int, ...] = (),
    null: float | None = None,
    top_p: float | None = None,
    equal: bool = False,
) -> tuple[dict, float]:
    """{position: weight} of the chosen, "null" for the base; and the gap between the last kept score and the next."""
    left = {p: s for p, s in scores.items() if p not in masked}
    if null is not None:
        left["null"] = null
    order = sorted((p for p in left if left[p] > -math.inf), key=lambda p: left[p], reverse=True)
    kept = order[:top_k]
    gap = left[kept[-1]] - left[order[top_k]] if len(order) > top_k else math.inf
    if not kept:
        return {}, gap
    raw = {p: 1.0 if equal else math.exp((left[p] - left[kept[0]]) / temperature) for p in kept}
    weights = {p: w / sum(raw.values()) for p, w in raw.items()}
    if top_p is not None:
        chosen, total = {}, 0.0
        for p in kept:
            if total >= top_p:
                break
            chosen[p] = weights[p]
            total += weights[p]
        weights = {p: w / total for p, w in chosen.items()}
    return weights, gap
