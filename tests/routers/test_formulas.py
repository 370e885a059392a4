"""Each router that needs no data against its formula, in every layer and for every token."""

from __future__ import annotations

import zlib
from statistics import NormalDist

import numpy as np
import pytest
import torch

from peft_arrow import ROUTERS
from peft_arrow.routers import RandomRouter
from tests.routers import formulas


SCORES = {
    "arrow": formulas.arrow,
    "spectr": formulas.spectr,
    "norm": formulas.norm,
}


def weigh(score, top_k=2, temperature=1.0, **options):
    """What `compare` takes, for a score of one token."""
    return lambda module, row, token, x, experts: formulas.choose(score(x, experts), top_k, temperature, **options)


@pytest.mark.parametrize("router", SCORES)
@pytest.mark.parametrize("top_k", [1, 3, 9])
def test_scores_equal_the_formula(model, compare, ids, router, top_k):
    """Mixed ranks, modules, layers, alphas; each token's update in each layer."""
    model.set_router(router, top_k=top_k, router_temperature=0.5)
    assert compare(model, ids, weigh(SCORES[router], top_k, 0.5)) < 1e-5
    others = [other for other in SCORES if other != router]
    assert all(compare(model, ids, weigh(SCORES[other], top_k, 0.5)) > 1e-4 for other in others)


def test_rank_deficient_experts_are_projected_on_what_their_update_has(tmp_path, ids):
    """Zero rows that pad an expert, and a direction that B does not use, are not part of V."""
    from safetensors.torch import load_file, save_file

    from peft_arrow import ArrowLoraModel
    from tests.pico import pico_adapter, pico_base
    from tests.reference import read_experts

    folder = pico_adapter(tmp_path / "padded", seed=1, r=4, target_modules=["q_proj"])
    path = str(tmp_path / "padded" / "adapter_model.safetensors")
    tensors = load_file(path)
    for key, value in tensors.items():
        if "lora_A" in key:
            value[3] = 0
        else:
            value[:, 2] = 0
    save_file(tensors, path)
    model = ArrowLoraModel.from_pretrained(pico_base(), {"padded": folder}, router="spectr")
    layer = model.base_model.routed_layers()["model.layers.0.self_attn.q_proj"]
    x = torch.randn(5, 32)
    experts = read_experts([folder])["model.layers.0.self_attn.q_proj"]
    expected = [formulas.spectr(row.double().numpy(), experts)[0] for row in x]
    np.testing.assert_allclose(layer.raw_logits("default", x)[:, 0], expected, rtol=1e-4)


@pytest.mark.parametrize("router", ["spectr", "norm"])
def test_equal_weights(model, compare, ids, router):
    """SpectR's code weighs the kept experts by 1/k."""
    model.set_router(router, top_k=3, weights="equal")
    assert compare(model, ids, weigh(SCORES[router], 3, equal=True)) < 1e-5
    assert compare(model, ids, weigh(SCORES[router], 3)) > 1e-4


@pytest.mark.parametrize("score", ["projection", "activation"])
def test_lag_filters_with_arrow(model, compare, ids, score):
    """Among the two that Arrow scores highest the longer; a filter as large as the library is none."""
    by = formulas.spectr if score == "projection" else formulas.norm
    model.set_router("lag", filter_k=2, top_k=1, score=score)
    assert compare(model, ids, weigh(lambda x, e: formulas.lag(x, e, 2, by), 1)) < 1e-5
    assert compare(model, ids, weigh(by, 1)) > 1e-4
    model.set_router("lag", filter_k=20)
    assert compare(model, ids, weigh(by, 1)) < 1e-5


def test_lag_keeps_fewer_than_top_k(model, compare, ids):
    """What the filter leaves out is not chosen, also where top_k asks for more."""
    model.set_router("lag", filter_k=2, top_k=4)
    assert compare(model, ids, weigh(lambda x, e: formulas.lag(x, e, 2, formulas.spectr), 4)) < 1e-5


def test_uniform_weighs_what_is_not_masked(model, compare, ids):
    """1 / n, whatever top_k says."""
    model.set_router("uniform", top_k=1, masked_experts=["dates"])
    alike = lambda x, experts: dict.fromkeys(experts, 0.0)  # noqa: E731
    assert compare(model, ids, weigh(alike, 9, masked=(1,))) < 1e-5


def test_random_is_its_formula_and_normal(model, compare, ids):
    """The numbers are those of a slow transcription on Python's integers; they depend on seed and module."""
    normal = NormalDist()

    def score(module, seed):
        salt = zlib.crc32(f"{module}:{seed}".encode())
        return lambda x, e: {
            p: normal.inv_cdf(u) for p, u in zip(e, formulas.random_uniforms(x, len(e), salt), strict=True)
        }

    def weigh_by(seed):
        return lambda module, row, token, x, e: formulas.choose(score(module, seed)(x, e), 2)

    model.set_router("random", seed=7)
    assert compare(model, ids, weigh_by(7)) < 1e-5
    assert compare(model, ids, weigh_by(8)) > 1e-4


def test_random_numbers_are_normal_and_independent():
    """Mean 0, variance 1, no correlation between experts, seeds, modules, or tokens that differ in one bit."""

    class View:
        num_experts, module = 8, "q_proj"
        x_TI = torch.randn(4000, 16)

    scores = RandomRouter(seed=0).score(View())
    assert abs(float(scores.mean())) < 0.02 and abs(float(scores.std()) - 1) < 0.02
    assert float((torch.corrcoef(scores.T) - torch.eye(8)).abs().max()) < 0.08
    other = RandomRouter(seed=1).score(View())
    assert abs(float((scores * other).mean())) < 0.02
    near = View()
    near.x_TI = torch.nextafter(View.x_TI, torch.full_like(View.x_TI, 9.0))
    assert abs(float((scores * RandomRouter(seed=0).score(near)).mean())) < 0.02
    near.x_TI, near.module = View.x_TI, "k_proj"
    assert abs(float((scores * RandomRouter(seed=0).score(near)).mean())) < 0.02


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_tells_where_it_is_from(name):
    """Name, summary and, but for the controls, the paper's address."""
    row = ROUTERS[name]
    assert row.name == name and row.summary
    assert row.paper.startswith("https://arxiv.org/abs/") or name in ("random", "pinned")
