"""Two stages against scores in float64, made apart: the same experts, or such as float32 cannot tell apart."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from peft_arrow.ops import scoring
from peft_arrow.ops.scoring import scores_in_two_stages, scoring_index, top_k_in_full, top_k_in_two_stages


E, K, WIDTH = 700, 4, 96


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(rows):
    return rows / rows.norm(dim=-1, keepdim=True)


def true_scores(x_TI, rows_EI):
    """|x . p| in float64, (T, E), of the numbers as float32 has them."""
    return np.abs(x_TI.float().double().numpy() @ rows_EI.double().numpy().T)


def check(found, x_TI, prototypes, k=K):
    """The chosen are the k largest, or differ from them by what float32 loses; the scores are theirs, descending."""
    assert found.scores_GTK.shape == found.index_GTK.shape == (len(prototypes), len(x_TI), k)
    assert found.scores_GTK.dtype == torch.float32 and found.index_GTK.dtype == torch.int64
    x_lengths = np.linalg.norm(x_TI.float().double().numpy(), axis=1)
    for scores_TK, index_TK, rows_EI in zip(found.scores_GTK, found.index_GTK, prototypes, strict=True):
        true_TE = true_scores(x_TI, rows_EI)
        longest = np.linalg.norm(rows_EI.double().numpy(), axis=1).max()
        rounding_T = 2 * x_TI.shape[1] * 2.0**-24 * x_lengths * longest + 1e-44
        for t, (scores, index) in enumerate(zip(scores_TK.numpy(), index_TK.numpy(), strict=True)):
            assert len(set(index)) == k and (np.diff(scores) <= 0).all()
            assert np.abs(scores - true_TE[t, index]).max() <= rounding_T[t]
            others = np.delete(true_TE[t], index)
            assert not len(others) or true_TE[t, index].min() >= others.max() - 2 * rounding_T[t]


def same_as_full(x_TI, prototypes, k=K):
    found, full = top_k_in_two_stages(x_TI, scoring_index(prototypes), k), top_k_in_full(x_TI, prototypes, k)
    assert found.full_share == 1.0
    assert torch.equal(found.index_GTK, full.index_GTK)
    torch.testing.assert_close(found.scores_GTK, full.scores_GTK, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("tokens", [1, 37])
def test_chooses_the_largest(dtype, groups, tokens):
    prototypes = list(unit(draw(0, groups, E, WIDTH)))
    x_TI = draw(1, tokens, WIDTH).to(dtype)
    found = top_k_in_two_stages(x_TI, scoring_index(prototypes), K)
    check(found, x_TI, prototypes)
    assert found.full_share < 0.2


@pytest.mark.parametrize(("experts", "k"), [(4, 4), (65, 1), (512, 4), (513, 4), (700, 1), (1000, 8), (1000, 7)])
def test_any_number_of_experts(experts, k):
    prototypes = [unit(draw(2, experts, WIDTH))]
    x_TI = draw(3, 19, WIDTH)
    check(top_k_in_two_stages(x_TI, scoring_index(prototypes), k), x_TI, prototypes, k)


def test_prototypes_of_any_length_and_strides():
    rows_EI = draw(4, WIDTH, E).t() * torch.linspace(0.01, 30, E).unsqueeze(1)
    x_TI = draw(5, WIDTH, 40).t()[::2]
    assert not rows_EI.is_contiguous() and not x_TI.is_contiguous()
    check(top_k_in_two_stages(x_TI, scoring_index([rows_EI]), K), x_TI, [rows_EI])


@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("seed", range(5))
def test_near_ties_around_the_last_place(gap, seed):
    """For each of the tokens, prototypes are planted whose scores differ by steps of `gap` around the k-th place."""
    x_TI, rows_EI = draw(10 + seed, 24, WIDTH), unit(draw(20 + seed, E, WIDTH)) * 0.9
    places = torch.randperm(E, generator=torch.Generator().manual_seed(seed))
    for t in range(24):
        for step in range(8):
            along = unit(x_TI[t])
            other = draw(1000 * t + 10 * seed + step, WIDTH)
            other = unit(other - (other @ along) * along)
            height = 0.6 + gap * step
            rows_EI[places[8 * t + step]] = height * along + (1 - height**2) ** 0.5 * other
    sign = torch.where(draw(30 + seed, E, 1) > 0, 1.0, -1.0)
    check(top_k_in_two_stages(x_TI, scoring_index([rows_EI * sign]), K), x_TI, [rows_EI * sign])


STEP, NINE_TENTHS = 2.0**-7, 230 / 256  # of bfloat16 above 1; and a number that it has
DOWN, UP = 1 + 0.45 * STEP, 1 + 0.55 * STEP  # are rounded to 1 and to 1 + STEP


@pytest.mark.parametrize("rounded", ["x", "prototypes"])
def test_rounding_that_works_against_the_bound(rounded):
    """Halves that nearly cancel, rounded such that the largest scores look smaller, and the next ones larger."""
    if rounded == "x":
        x, best, next_best = (DOWN, UP), (1, -NINE_TENTHS), (-231 / 256, 1)
    else:
        x, best, next_best = (1, -NINE_TENTHS), (DOWN, UP), (UP, UP + 0.9 * STEP)
    halves = lambda pair: torch.tensor(pair, dtype=torch.float32).repeat_interleave(WIDTH // 2)  # noqa: E731
    x_TI, rows_EI = halves(x).repeat(5, 1), 0.001 * unit(draw(40, E, WIDTH))
    rows_EI[:20], rows_EI[20:40] = halves(best), halves(next_best)
    rows_EI = rows_EI * torch.where(draw(41, E, 1) > 0, 1.0, -1.0)
    assert set(true_scores(x_TI, rows_EI)[0].argsort()[-20:]) == set(range(20))
    assert set(true_scores(x_TI.bfloat16(), rows_EI.bfloat16())[0].argsort()[-20:]) == set(range(20, 40))
    found = top_k_in_two_stages(x_TI, scoring_index([rows_EI]), K)
    check(found, x_TI, [rows_EI])
    assert found.full_share == 0.0 and (found.index_GTK < 20).all()


def test_what_was_lost_is_made_good():
    """Stage one with noise decides as the full scoring does where the index tells of the noise, and not otherwise."""
    x_TI, prototypes = draw(6, 3000, WIDTH), [unit(draw(7, E, WIDTH))]
    index, full = scoring_index(prototypes), top_k_in_full(x_TI, prototypes, K)
    noise_GPI = (0.05 * draw(8, *index.rounded_GPI.shape) * index.rounded_GPI.float()).bfloat16()
    worse = index._replace(rounded_GPI=index.rounded_GPI + noise_GPI)
    assert differing(top_k_in_two_stages(x_TI, worse, K), full) > 0.001
    lost = float((worse.rounded_GPI.float() - index.rounded_GPI.float()).norm(dim=-1).max())
    told = worse._replace(lost=(index.lost[0] + 1.01 * lost,))
    check(top_k_in_two_stages(x_TI, told, K), x_TI, prototypes)


def differing(found, full):
    return float((found.index_GTK.sort(-1)[0] != full.index_GTK.sort(-1)[0]).any(-1).float().mean())


@pytest.mark.parametrize("margin", [0.0, 0.25, 1.0])
def test_margin_takes_fewer_candidates(margin, monkeypatch):
    x_TI, prototypes = draw(9, 200, WIDTH), [unit(draw(10, E, WIDTH))]
    seen = []
    real = scoring._candidates
    monkeypatch.setattr(scoring, "_candidates", lambda *args: seen.append(real(*args)) or seen[-1])
    found = top_k_in_two_stages(x_TI, scoring_index(prototypes), K, margin)
    top_k_in_two_stages(x_TI, scoring_index(prototypes), K)
    assert len(seen[0][0]) <= len(seen[1][0])
    assert differing(found, top_k_in_full(x_TI, prototypes, K)) <= 0.01
    assert (found.index_GTK >= 0).all() and (found.index_GTK < E).all()


def test_ties_are_scored_in_full():
    prototypes = [unit(draw(11, 1, WIDTH)).repeat(E, 1)]
    same_as_full(draw(12, 20, WIDTH), prototypes)


@pytest.mark.parametrize("families", [5, 8, 64])
@pytest.mark.parametrize("in_a_row", [False, True])
def test_families_of_like_experts_are_not_scored_in_full(families, in_a_row):
    member_E = torch.arange(E) * families // E if in_a_row else torch.arange(E) % families
    rows_EI = unit(unit(draw(28, families, WIDTH))[member_E] + 0.3 * unit(draw(29, E, WIDTH)))
    x_TI = draw(30, 50, WIDTH)
    found = top_k_in_two_stages(x_TI, scoring_index([rows_EI]), K)
    check(found, x_TI, [rows_EI])
    assert found.full_share < 0.2


def test_some_duplicates():
    rows_EI = unit(draw(13, E, WIDTH))
    rows_EI[100:120] = rows_EI[5]
    x_TI = torch.cat([draw(14, 10, WIDTH), rows_EI[5:6] * 3])
    check(top_k_in_two_stages(x_TI, scoring_index([rows_EI]), K), x_TI, [rows_EI])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, 1e-30, 1e30])
def test_tokens_without_a_bound_are_scored_in_full(value):
    prototypes = list(unit(draw(15, 2, E, WIDTH)))
    x_TI = draw(16, 64, WIDTH)
    x_TI[[3, 40]] = value
    x_TI[50, 7] = value if value != 0.0 else float("nan")
    found, full = top_k_in_two_stages(x_TI, scoring_index(prototypes), K), top_k_in_full(x_TI, prototypes, K)
    is_plain_T = torch.ones(64, dtype=torch.bool)
    is_plain_T[[3, 40, 50]] = False
    plain = found._replace(scores_GTK=found.scores_GTK[:, is_plain_T], index_GTK=found.index_GTK[:, is_plain_T])
    check(plain, x_TI[is_plain_T], prototypes)
    assert 2 / 64 <= found.full_share < 0.2
    few = top_k_in_full(x_TI[[3, 40]], prototypes, K)
    torch.testing.assert_close(found.scores_GTK[:, [3, 40]], few.scores_GTK, rtol=1e-5, atol=1e-30, equal_nan=True)
    torch.testing.assert_close(found.scores_GTK[:, 50], full.scores_GTK[:, 50], rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_prototypes_without_a_bound_are_scored_in_full(value):
    rows_EI = unit(draw(17, E, WIDTH))
    rows_EI[33, 3] = value
    same_as_full(draw(18, 20, WIDTH), [rows_EI])
    same_as_full(draw(18, 20, WIDTH), [rows_EI * 0])


def test_gradients_and_inference_mode():
    prototypes, x_TI = [unit(draw(19, E, WIDTH)).requires_grad_()], draw(20, 9, WIDTH).requires_grad_()
    found = top_k_in_two_stages(x_TI, scoring_index(prototypes), K)
    assert not found.scores_GTK.requires_grad
    with torch.inference_mode():
        again = top_k_in_two_stages(x_TI, scoring_index(prototypes), K)
    assert torch.equal(found.index_GTK, again.index_GTK)


def test_changes_nothing_that_it_was_given():
    prototypes, x_TI = [unit(draw(21, E, WIDTH))], draw(22, 9, WIDTH)
    before = prototypes[0].clone(), x_TI.clone()
    index = scoring_index(prototypes)
    top_k_in_two_stages(x_TI, index, K)
    assert torch.equal(before[0], prototypes[0]) and torch.equal(before[1], x_TI)
    assert index.prototypes[0].data_ptr() == prototypes[0].data_ptr()


def test_no_tokens():
    found = top_k_in_two_stages(draw(23, 0, WIDTH), scoring_index([unit(draw(24, E, WIDTH))]), K)
    assert found.index_GTK.shape == (1, 0, K)


def test_is_silent():
    """In a new process, because torch says only once that sparse tensors are in beta."""
    code = """
import warnings, torch
from peft_arrow.ops.scoring import scoring_index, top_k_in_two_stages
from peft_arrow.ops.sparse_calls import sampled
torch.manual_seed(0)
with warnings.catch_warnings(record=True) as caught, torch.no_grad():
    warnings.simplefilter("always")
    sampled(torch.randn(3, 8), torch.randn(9, 8), torch.tensor([[0, 2]] * 3))
    top_k_in_two_stages(torch.randn(9, 8), scoring_index([torch.randn(600, 8)]), 2)
print([str(one.message) for one in caught])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_refused():
    index = scoring_index([unit(draw(27, E, WIDTH))])
    for arguments in [(draw(0, 2, WIDTH), index, 0), (draw(0, 2, WIDTH), index, E + 1)]:
        with pytest.raises(ValueError, match="k="):
            top_k_in_two_stages(*arguments)
    with pytest.raises(ValueError, match="margin=2"):
        top_k_in_two_stages(draw(0, 2, WIDTH), index, K, margin=2.0)
    with pytest.raises(ValueError, match="x_TI has shape"):
        top_k_in_two_stages(draw(0, 2, WIDTH + 1), index, K)
    for prototypes in ([], [draw(0, E)], [draw(0, E, WIDTH), draw(0, E, WIDTH + 1)]):
        with pytest.raises(ValueError, match="one shape"):
            scoring_index(prototypes)


def test_where_it_is_worth_it(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(scoring, "_multiplies_bfloat16", lambda: True)
    assert scores_in_two_stages(512, 1000, 576, K, cpu)
    assert not scores_in_two_stages(512, 1000, 32, K, cpu)
    assert not scores_in_two_stages(512, 1000, 1536, K, cpu)
    assert not scores_in_two_stages(1, 1000, 576, K, cpu)
    assert not scores_in_two_stages(512, 128, 576, K, cpu)
    assert not scores_in_two_stages(512, 1000, 576, 64, cpu)
    assert not scores_in_two_stages(512, 1000, 576, K, torch.device("cuda"))
    monkeypatch.setattr(scoring, "_multiplies_bfloat16", lambda: False)
    assert not scores_in_two_stages(512, 1000, 576, K, cpu)
