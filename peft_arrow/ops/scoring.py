"""The largest of a thousand scores |x . p|: a product in bfloat16 finds candidates, float32 decides between them.

**What is proven.** Let x = x' + dx and p = p' + dp, where x' and p' are the roundings to bfloat16. Then

    x . p = x' . p' + dx . p + x' . dp,    |dx . p + x' . dp| <= |dx| |p| + |x'| |dp|

with lengths that are computed, not guessed. The product of stage one sums x' . p' in float32, which is off by at most
2 I u |x'| |p'| for u = 2^-24 in any order of summing, and rounds the sum to bfloat16, which is off by at most 2^-8 of
what comes out. So with `bound` = |dx| |p| + |x'| |dp| + 8 I u |x| |p|, taken at the largest |p| and |dp| of a module,
a score s of stage one is within `bound` + s / 256 of the true score.

Experts are cut into slabs. If m is the k-th largest of the slabs' largest s, then k experts have true scores of at
least m - m / 256 - bound, and an expert with s < m - m / 128 - 2 bound is below all of them. The others are candidates
and get float32 scores. 6 I u |x| |p| of the bound is spare: it covers what float32 does to the scores of two experts
in the full scoring, so that the k which the full scoring in float32 would choose are among the candidates too.

**So the result is that of the full scoring in float32**, up to the order of summing: where it has another expert, the
true scores of the two experts differ by at most the rounding of two float32 products of length I, 4 I u |x| |p|, as
those of the full scoring itself may with another number of tokens in the call.

Tokens for which this says nothing are scored in full: those with NaN, infinities, lengths outside of 1e-10 to 1e10 (a
zero input among them) and those with more than an eighth of the experts as candidates, such as at ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .sparse_calls import products_at


SLAB = 64  # experts of which one maximum is taken: as many as two registers of int16 hold
SHORTEST, LONGEST = 1e-10, 1e10  # lengths between which nothing that matters under- or overflows
SIGN_OFF = 0x7FFF
# Measured on one CPU with bfloat16 instructions, see docs/kernels.md.
FEWEST_EXPERTS, FEWEST_TOKENS, WIDTHS = 768, 512, range(256, 1025)


class ScoringIndex(NamedTuple):
    """Prototypes of G modules that share an input, ready for two stages.

    Args:
        prototypes (`tuple[torch.Tensor, ...]`): (E, I) of each module, float32: those given, not copies.
        rounded_GPI (`torch.Tensor`):
            bfloat16, padded with zeros to P, a multiple of `SLAB`, and shuffled: near copies of an expert, which often
            come in a row or at even distances, would else share a few slabs, and the k-th maximum would be too low.
        expert_P (`torch.Tensor`): int64, the expert at each place.
        longest (`tuple[float, ...]`): the largest |p| of each module.
        lost (`tuple[float, ...]`): the largest |dp| of each module.
        is_sound (`bool`): whether the bounds hold; otherwise all tokens are scored in full.
    """

    prototypes: tuple[torch.Tensor, ...]
    rounded_GPI: torch.Tensor
    expert_P: torch.Tensor
    longest: tuple[float, ...]
    lost: tuple[float, ...]
    is_sound: bool


class TopScores(NamedTuple):
    """The largest scores of each token.

    Args:
        scores_GTK (`torch.Tensor`): float32 |x . p|, descending.
        index_GTK (`torch.Tensor`): int64, the experts.
        full_share (`float`): share of tokens that were scored in full.
    """

    scores_GTK: torch.Tensor
    index_GTK: torch.Tensor
    full_share: float


def scores_in_two_stages(tokens: int, experts: int, width: int, top_k: int, device: torch.device) -> bool:
    """Whether two stages were measured to be faster than the full scoring; on GPUs nothing was measured.

    Args:
        tokens (`int`): T.
        experts (`int`): E.
        width (`int`): I.
        top_k (`int`): K.
        device (`torch.device`): where the scores are made.
    """
    is_large = tokens >= FEWEST_TOKENS and experts >= max(FEWEST_EXPERTS, 2 * top_k * SLAB)
    return is_large and width in WIDTHS and device.type == "cpu" and _multiplies_bfloat16()


@torch.no_grad()
def scoring_index(prototypes: Sequence[torch.Tensor]) -> ScoringIndex:
    """Prepare two stages for prototypes as they are now; after a change of them this is to be called again.

    Args:
        prototypes (`Sequence[torch.Tensor]`): (E, I) of each module; kept, where they are float32.

    Raises:
        ValueError: there are none, or the modules differ in the number of experts or in width.
    """
    shapes = [tuple(rows_EI.shape) for rows_EI in prototypes]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2:
        raise ValueError(f"prototypes must be matrices (E, I) of one shape, at least one; got shapes {shapes}.")
    kept = tuple(rows_EI.detach().float() for rows_EI in prototypes)
    (experts, width), places = shapes[0], -(-shapes[0][0] // SLAB) * SLAB
    rounded_GPI = torch.zeros(len(kept), places, width, dtype=torch.bfloat16, device=kept[0].device)
    expert_P = torch.randperm(places, generator=torch.Generator().manual_seed(0), device="cpu").to(kept[0].device)
    longest, lost = [], []
    for places_PI, rows_EI in zip(rounded_GPI, kept, strict=True):
        places_PI[:experts] = rows_EI
        longest.append(float(rows_EI.norm(dim=1).max()))
        lost.append(float((rows_EI - places_PI[:experts].float()).norm(dim=1).max()))
        places_PI.copy_(places_PI[expert_P])
    is_sound = all(SHORTEST < one < LONGEST for one in longest) and all(one < LONGEST for one in lost)
    return ScoringIndex(kept, rounded_GPI, expert_P, tuple(longest), tuple(lost), is_sound)


@torch.no_grad()
def top_k_in_full(x_TI: torch.Tensor, prototypes: Sequence[torch.Tensor], k: int) -> TopScores:
    """All scores in float32, and the largest of them; what two stages are to give.

    Args:
        x_TI (`torch.Tensor`): layer inputs of any float dtype.
        prototypes (`Sequence[torch.Tensor]`): (E, I) of each module, float32.
        k (`int`): K, at most E.
    """
    return TopScores(*torch.topk(full_scores(x_TI, prototypes), k, dim=-1), 1.0)


def full_scores(x_TI: torch.Tensor, prototypes: Sequence[torch.Tensor]) -> torch.Tensor:
    """|x . p| of each module's prototypes, float32 (G, T, E); arguments as for `top_k_in_full`. No gradients."""
    x_TI = x_TI.float()
    scores_GTE = x_TI.new_empty(len(prototypes), len(x_TI), len(prototypes[0]))
    for scores_TE, rows_EI in zip(scores_GTE, prototypes, strict=True):
        torch.mm(x_TI, rows_EI.t(), out=scores_TE)
    return scores_GTE.abs_()


@torch.no_grad()
def top_k_in_two_stages(x_TI: torch.Tensor, index: ScoringIndex, k: int, margin: float = 1.0) -> TopScores:
    """The largest scores |x . p|, without scoring all experts in float32. No gradients.

    Args:
        x_TI (`torch.Tensor`): layer inputs of any float dtype and strides.
        index (`ScoringIndex`): of the prototypes.
        k (`int`): K, at most E.
        margin (`float`):
            Share of the proven bound by which candidates are taken. 1.0 gives the choice of the full scoring; less
            may leave out an expert that the full scoring would choose, and tells nobody.

    Raises:
        ValueError: k is not in 1 to E, margin not in 0 to 1, or x has another width.
    """
    experts, width = index.prototypes[0].shape
    if not 1 <= k <= experts:
        raise ValueError(f"k={k} must be from 1 to the number of experts, {experts}.")
    if not 0.0 <= margin <= 1.0:
        raise ValueError(f"margin={margin} must be from 0.0 to 1.0.")
    if x_TI.dim() != 2 or x_TI.shape[1] != width:
        raise ValueError(f"x_TI has shape {tuple(x_TI.shape)}; the prototypes need (tokens, {width}).")
    slabs = index.rounded_GPI.shape[1] // SLAB
    if not index.is_sound or slabs < 2 * k or not len(x_TI):
        return top_k_in_full(x_TI, index.prototypes, k)
    x_TI = x_TI.float().contiguous()
    bits_GTP, largest_GTS, least_GT, is_open_T = _stage_one(x_TI, index, k, margin)
    row_N, expert_N = _candidates(bits_GTP, largest_GTS, least_GT, index.expert_P)
    count_GT = torch.bincount(row_N, minlength=least_GT.numel()).view_as(least_GT)
    is_open_T |= (count_GT > max(experts // 8, k)).any(0)
    num_open = int(is_open_T.sum())
    if 4 * num_open > len(x_TI):
        return top_k_in_full(x_TI, index.prototypes, k)
    if num_open:
        is_settled_N = ~is_open_T[row_N % len(x_TI)]
        row_N, expert_N = row_N[is_settled_N], expert_N[is_settled_N]
        count_GT = count_GT.masked_fill(is_open_T, 0)
    scores_GTK, index_GTK = _decide(x_TI, index, row_N, expert_N, count_GT, k)
    if num_open:
        full = top_k_in_full(x_TI[is_open_T], index.prototypes, k)
        scores_GTK[:, is_open_T], index_GTK[:, is_open_T] = full.scores_GTK, full.index_GTK
    return TopScores(scores_GTK, index_GTK, num_open / len(x_TI))


def _stage_one(x_TI: torch.Tensor, index: ScoringIndex, k: int, margin: float):
    """What stage one says of each token.

    Returns:
        |x' . p'| as bits of bfloat16, int16 (G, T, P), which sort as the numbers do; the largest of each slab
        (G, T, S); the least of a candidate (G, T); bool (T,), whether nothing is known of a token.
    """
    rounded_TI = x_TI.bfloat16()
    lost_T, short_T = (x_TI - rounded_TI).norm(dim=1), x_TI.norm(dim=1)
    places = index.rounded_GPI
    scores_GTP = rounded_TI.new_empty(len(places), len(x_TI), places.shape[1])
    for scores_TP, places_PI in zip(scores_GTP, places, strict=True):
        torch.mm(rounded_TI, places_PI.t(), out=scores_TP)
    bits_GTP = scores_GTP.view(torch.int16).bitwise_and_(SIGN_OFF)
    largest_GTS = bits_GTP.view(*bits_GTP.shape[:2], -1, SLAB).amax(-1)
    kth_GT = largest_GTS.topk(k, dim=-1).values[..., -1].contiguous().view(torch.bfloat16).float()
    rounding = 8 * x_TI.shape[1] * 2.0**-24
    bound_GT = torch.stack(
        [
            lost_T * longest + (short_T + lost_T) * lost + rounding * longest * short_T
            for longest, lost in zip(index.longest, index.lost, strict=True)
        ]
    )
    # the bound's own rounding: lengths in float32, and the subtraction here
    least_GT = kth_GT * (1 - 2.0**-7) - (2 * margin * (1 + rounding)) * bound_GT
    is_open_T = ~((short_T > SHORTEST) & (short_T < LONGEST)) | ~(least_GT > SHORTEST**2).all(0)
    cut_GT = least_GT.contiguous().view(torch.int32) >> 16  # to bfloat16, downwards
    return bits_GTP, largest_GTS, cut_GT.masked_fill_(is_open_T, SIGN_OFF).to(torch.int16), is_open_T


def _candidates(bits_GTP: torch.Tensor, largest_GTS: torch.Tensor, least_GT: torch.Tensor, expert_P: torch.Tensor):
    """Row g T + t and expert of each candidate, int64 (N,), ordered by row."""
    slabs, least = largest_GTS.shape[-1], least_GT.view(-1)
    hit_H = (largest_GTS >= least_GT.unsqueeze(-1)).view(-1).nonzero().view(-1)
    row_H = hit_H // slabs
    place_N = (bits_GTP.view(-1, SLAB)[hit_H] >= least[row_H].unsqueeze(1)).view(-1).nonzero().view(-1)
    at_N, within_N = place_N // SLAB, place_N % SLAB
    return row_H[at_N], expert_P[hit_H[at_N] % slabs * SLAB + within_N]


def _decide(x_TI: torch.Tensor, index: ScoringIndex, row_N, expert_N, count_GT: torch.Tensor, k: int):
    """Scores (G, T, K) and experts (G, T, K): the float32 scores of the candidates, and the largest."""
    ends_GT = count_GT.view(-1).cumsum(0).view_as(count_GT)
    starts_GT = ends_GT - count_GT
    width = max(int(count_GT.max()), k)
    score_N = x_TI.new_empty(len(row_N))
    bounds = [0, *ends_GT[:, -1].tolist()]
    for g, rows_EI in enumerate(index.prototypes):
        begin, end = bounds[g], bounds[g + 1]
        first = torch.cat([starts_GT[g], ends_GT[g, -1:]]) - begin
        score_N[begin:end] = products_at(x_TI, rows_EI, first, expert_N[begin:end])
    place_N = torch.arange(len(row_N), device=x_TI.device) + (row_N * width - starts_GT.view(-1)[row_N])
    scores = x_TI.new_full((*count_GT.shape, width), -1.0)
    experts = expert_N.new_zeros(scores.shape)
    scores.view(-1)[place_N], experts.view(-1)[place_N] = score_N.abs_(), expert_N
    scores_GTK, at_GTK = scores.topk(k, dim=-1)
    return scores_GTK, experts.gather(-1, at_GTK)


def _multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 and sums in float32."""
    return torch.backends.mkldnn.is_available() and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
