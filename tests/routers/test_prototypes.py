"""Prototypes are exact: the top right singular vector of the dense update, on any spectrum and any scale."""

from __future__ import annotations

import pytest
import torch

from peft_arrow.routers import top_right_singular_vectors


def random_pair(rank, in_features, out_features, seed, spectrum=None):
    """A (r, I) and B (O, r) with, if given, that spectrum of B A."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, in_features, generator=generator, dtype=torch.float64)
    B = torch.randn(out_features, rank, generator=generator, dtype=torch.float64)
    if spectrum is not None:
        A = torch.linalg.qr(A.T)[0].T
        B = torch.linalg.qr(B)[0] * torch.tensor(spectrum, dtype=torch.float64)
        mix = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
        A, B = torch.linalg.solve(mix, A), B @ mix
    return A, B


def exact(A, B):
    """By a dense SVD in float64."""
    return torch.linalg.svd(B.double() @ A.double(), full_matrices=False).Vh[0]


@pytest.mark.parametrize("rank, in_features, out_features", [(1, 5, 3), (4, 64, 64), (8, 31, 129), (16, 7, 40)])
def test_equals_dense_svd(rank, in_features, out_features):
    """Random factors of odd sizes, also a rank above the width."""
    pairs = [random_pair(rank, in_features, out_features, seed) for seed in range(5)]
    got = top_right_singular_vectors([A.float() for A, _ in pairs], [B.float() for _, B in pairs])
    for (A, B), v in zip(pairs, got, strict=True):
        assert abs(float(v.double() @ exact(A.float(), B.float()))) > 1 - 1e-6
        assert float(v.norm()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("ratio", [0.5, 0.95, 0.99, 0.999])
def test_close_singular_values(ratio):
    """Where PEFT's power iteration gives |cos| down to 0.05 (method.md section 8, point 10)."""
    spectrum = [ratio**i for i in range(8)]
    for seed in range(10):
        A, B = (factor.float() for factor in random_pair(8, 96, 80, seed, spectrum))
        v = top_right_singular_vectors([A], [B])[0]
        assert abs(float(v.double() @ exact(A, B))) > 1 - 1e-4


@pytest.mark.parametrize("size", [1e-5, 1e-12, 1e-20, 1e12])
def test_any_magnitude(size):
    """A tiny update keeps a unit prototype (in PEFT its norm falls to 4e-6 at a standard deviation of 1e-5)."""
    A, B = (factor.float() for factor in random_pair(4, 64, 64, 0))
    small = top_right_singular_vectors([A], [B * size])[0]
    assert float(small.norm()) == pytest.approx(1.0, abs=1e-5)
    assert float(small @ top_right_singular_vectors([A], [B])[0]) == pytest.approx(1.0, abs=1e-5)


def test_mixed_ranks_keep_their_order():
    """Experts of different ranks are grouped for the work, not in the result."""
    pairs = [random_pair(rank, 24, 20, rank) for rank in (8, 2, 8, 5, 2)]
    together = top_right_singular_vectors([A.float() for A, _ in pairs], [B.float() for _, B in pairs])
    for (A, B), v in zip(pairs, together, strict=True):
        assert torch.allclose(v, top_right_singular_vectors([A.float()], [B.float()])[0], atol=1e-6)


def test_untrained_expert_is_scored_by_A():
    """B = 0: the top right singular vector of A, until B moves; A = 0 too: no direction."""
    A, B = (factor.float() for factor in random_pair(4, 24, 20, 1))
    v = top_right_singular_vectors([A, torch.zeros_like(A)], [torch.zeros_like(B)] * 2)
    assert abs(float(v[0].double() @ torch.linalg.svd(A.double(), full_matrices=False).Vh[0])) > 1 - 1e-6
    assert float(v[1].abs().max()) == 0.0


def test_gauge_and_sign():
    """(M A, B M^-1) is the same update and so the same prototype, sign included."""
    A, B = random_pair(4, 24, 20, 2)
    mix = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    one = top_right_singular_vectors([A.float()], [B.float()])[0]
    other = top_right_singular_vectors([(mix @ A).float()], [torch.linalg.solve(mix.T, B.T).T.float()])[0]
    assert torch.allclose(one, other, atol=1e-5)


def test_no_random_numbers():
    """Building moves no random generator, and gives the same bits twice."""
    A, B = (factor.float() for factor in random_pair(8, 64, 64, 3))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, two = top_right_singular_vectors([A], [B]), top_right_singular_vectors([A], [B])
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one, two)
