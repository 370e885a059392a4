"""Transforms against dense numpy: what is subtracted, what a rank loses, what the random control keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.arrow import ArrowLoraLinearLayer

from peft_arrow import AdapterLibrary, random_like, subtract_general
from peft_arrow.library.manifest import Origin
from tests.clustering.planted import BASE, MODULES, dense, pico_shapes, random_adapter
from tests.pico import pico_adapter, pico_base


QUERIES = tuple(module for module in pico_shapes() if module.endswith("q_proj"))
EXPERTS = AdapterLibrary([random_adapter("a", 1, 2), random_adapter("b", 2, 8), random_adapter("c", 3, 4)])
GENERAL = [random_adapter("g", 11, 3), random_adapter("h", 12, 5, lora_alpha=64)]


def mean_update(adapters) -> dict[str, np.ndarray]:
    """Dense mean; a module that one lacks counts as zero."""
    updates = [dense(adapter) for adapter in adapters]
    modules = {module: shape for update in updates for module, shape in ((m, u.shape) for m, u in update.items())}
    return {m: sum(u.get(m, np.zeros(shape)) for u in updates) / len(updates) for m, shape in modules.items()}


def assert_updates(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for module, update in expected.items():
        np.testing.assert_allclose(found[module], update, atol=2e-6 * abs(update).max())


@pytest.mark.parametrize("general", [GENERAL[:1], GENERAL, "mean"])
def test_the_whole_rank_is_exact(general):
    purified = subtract_general(EXPERTS, general)
    mean = mean_update(EXPERTS.values() if general == "mean" else general)
    assert list(purified) == list(EXPERTS) and purified is not EXPERTS
    for name, expert in EXPERTS.items():
        expected = {module: update - mean[module] for module, update in dense(expert).items()}
        assert_updates(dense(purified[name]), expected)
        config = purified[name].config
        ranks = [2, 8, 4] if general == "mean" else [expert.config["r"], *(one.config["r"] for one in general)]
        assert config["r"] == config["lora_alpha"] == sum(ranks) and "lost_norm" not in purified.notes.made


@pytest.mark.parametrize("rank", [1, 4])
def test_a_cut_rank_is_the_best_and_says_what_it_loses(rank):
    """Eckart and Young: the error is the norm of the singular values that are cut off."""
    purified, mean = subtract_general(EXPERTS, GENERAL, rank=rank), mean_update(GENERAL)
    for name, expert in EXPERTS.items():
        lost = whole = 0.0
        for module, update in dense(expert).items():
            values = np.linalg.svd(update - mean[module], compute_uv=False)
            error = np.linalg.norm(dense(purified[name])[module] - (update - mean[module]))
            assert error == pytest.approx(np.linalg.norm(values[rank:]), rel=1e-4)
            lost, whole = lost + (values[rank:] ** 2).sum(), whole + (values**2).sum()
        assert purified[name].config["r"] == rank
        assert purified.notes.made["lost_norm"][name] == pytest.approx((lost / whole) ** 0.5, abs=6e-5)


def test_modules_of_one_side_only():
    """What the general adapter lacks stays; what only it has becomes minus its update."""
    everywhere, queries = random_adapter("wide", 1, 4), random_adapter("narrow", 2, 3, modules=QUERIES)
    wide = dense(subtract_general(AdapterLibrary([everywhere]), queries)["wide"])
    narrow = dense(subtract_general(AdapterLibrary([queries]), everywhere)["narrow"])
    zero = {module: np.zeros(shape) for module, shape in pico_shapes().items()}
    of_queries = {**zero, **dense(queries)}
    assert_updates(wide, {module: update - of_queries[module] for module, update in dense(everywhere).items()})
    assert_updates(narrow, {module: -wide[module] for module in wide})


def test_a_module_that_is_general_is_dropped_and_named():
    expert, general = random_adapter("a", 1, 4), random_adapter("g", 2, 4, modules=QUERIES)
    tensors = {key: tensor for key, tensor in expert.tensors.items() if QUERIES[0] not in key}
    same = {key: tensor for key, tensor in general.tensors.items() if QUERIES[0] in key}
    purified = subtract_general(AdapterLibrary([replace(expert, tensors={**tensors, **same})]), general)
    assert QUERIES[0] not in dense(purified["a"]) and QUERIES[1] in dense(purified["a"])
    assert purified.notes.made["dropped_modules"] == {"a": [QUERIES[0]]}


@pytest.mark.parametrize("count", [1, 2])
def test_factors_are_what_peft_computes(count):
    """PEFT's own method, called on the bare factors of one layer."""
    experts = AdapterLibrary([random_adapter("a", 1, 4, lora_alpha=32), random_adapter("b", 2, 4)])
    generals = [random_adapter(f"g{seed}", 10 + seed, 4) for seed in range(count)]
    found = subtract_general(experts, generals, space="factors")
    everyone = {**experts, **{f"gks_{position}": one for position, one in enumerate(generals)}}
    for key in experts["a"].tensors:
        if "lora_A" not in key:
            continue
        factors = [
            {name: SimpleNamespace(weight=one.tensors[half].clone()) for name, one in everyone.items()}
            for half in (key, key.replace("lora_A", "lora_B"))
        ]
        layer = SimpleNamespace(
            use_gks=True,
            gks_done=False,
            gks_added_adapter_names=[],
            task_adapter_names=["a", "b"],
            gks_adapter_names=[f"gks_{position}" for position in range(count)],
        )
        ArrowLoraLinearLayer.gen_know_sub(layer, *factors)
        for name in experts:
            torch.testing.assert_close(found[name].tensors[key], factors[0][name].weight)
            torch.testing.assert_close(found[name].tensors[key.replace("lora_A", "lora_B")], factors[1][name].weight)
    assert found["a"].config == experts["a"].config


def test_factors_need_equal_ranks_and_modules():
    with pytest.raises(ValueError, match=r"k_proj has rank 4, and a general adapter has rank 3; space='factors'"):
        subtract_general(AdapterLibrary([random_adapter("a", 1, 4)]), GENERAL[0], space="factors")
    narrow, wide = random_adapter("n", 1, 4, modules=QUERIES), random_adapter("w", 2, 4)
    with pytest.raises(ValueError, match="has no model.layers.0.self_attn.k_proj, which a general adapter has"):
        subtract_general(AdapterLibrary([narrow]), wide, space="factors")
    with pytest.raises(ValueError, match="k_proj has rank 4, and a general adapter lacks it"):
        subtract_general(AdapterLibrary([wide]), narrow, space="factors")


@pytest.mark.parametrize(
    ("general", "options", "message"),
    [
        (GENERAL, {"space": "ab"}, "space='ab' is not allowed; it is one of 'delta', 'factors'"),
        (GENERAL, {"rank": 0}, "rank=0 is not allowed"),
        (GENERAL, {"rank": 2, "space": "factors"}, "rank=2 goes with space='delta'"),
        ([], {}, "empty"),
        (random_adapter("g", 4, base_model_name_or_path="you/other"), {}, "'you/other', the library for 'me/pico'"),
        (random_adapter("g", 4, task_type="SEQ_CLS"), {}, "task_type is 'SEQ_CLS' in 'g'"),
        (random_adapter("g", 4, use_dora=True), {}, "DoRA"),
        (random_adapter("g", 4, init_lora_weights="pissa"), {}, "does not follow from its files"),
        ("nowhere/at-all", {}, "nowhere/at-all"),
    ],
)
def test_bad_arguments(general, options, message):
    with pytest.raises(ValueError, match=message):
        subtract_general(EXPERTS, general, **options)


def test_nothing_left_and_not_finite():
    with pytest.raises(ValueError, match=r"'a' \(memory\): nothing is left of its update.*without\(\['a'\]\)"):
        subtract_general(EXPERTS.select(["a"]), "mean")
    broken = {key: tensor.clone() for key, tensor in EXPERTS["a"].tensors.items()}
    next(iter(broken.values()))[0, 0] = float("nan")
    with pytest.raises(ValueError, match="holds NaN, Inf"):
        subtract_general(EXPERTS, replace(EXPERTS["a"], tensors=broken))


def test_saved_and_loaded_by_plain_peft(tmp_path):
    """The folder is a library with its card; plain PEFT gives the logits of the dense difference."""
    names = ("task", "general")
    for seed, name in enumerate(names):
        pico_adapter(tmp_path / name, seed=seed, r=4 + seed, lora_alpha=16, target_modules=list(MODULES))
    library = AdapterLibrary.from_pretrained([tmp_path / "task"], BASE).describe(made={"command": "train"})
    purified = subtract_general(library, tmp_path / "general")
    purified.save_pretrained(tmp_path / "purified")
    made = json.loads((tmp_path / "purified/library.json").read_text())["made"]
    assert made["command"] == "subtract_general(library, ['general'], space='delta', rank=None)"
    assert made["experts"] == {"command": "train"} and list(made["general"]) == ["general"]
    assert "2505.10939" in (tmp_path / "purified/README.md").read_text()
    base, ids = pico_base(), torch.arange(4, 24)[None]
    with torch.no_grad():
        plain = PeftModel.from_pretrained(pico_base(), tmp_path / "purified/experts/task")(ids).logits
        for name, sign in zip(names, (1, -1)):
            folder = AdapterLibrary.from_pretrained([tmp_path / name], BASE)
            for module, update in dense(folder[name]).items():
                base.get_submodule(module).weight += sign * torch.from_numpy(update).float()
        torch.testing.assert_close(plain, base(ids).logits, atol=1e-5, rtol=0)


def test_origin_is_that_of_all():
    expert = replace(EXPERTS["a"], origin=Origin(license="mit", task="dates", datasets=("me/x",)))
    general = replace(GENERAL[0], origin=Origin(license="cc-by-nc-4.0", task="wiki", datasets=("me/y",)))
    purified = subtract_general(AdapterLibrary([expert]), general)
    assert purified["a"].origin == Origin(license="cc-by-nc-4.0", task="dates", datasets=("me/x", "me/y"))


def test_random_like_keeps_norms_and_shapes():
    control = random_like(EXPERTS, seed=3)
    assert list(control) == list(EXPERTS)
    for name, expert in EXPERTS.items():
        assert {key: t.shape for key, t in control[name].tensors.items()} == {
            key: t.shape for key, t in expert.tensors.items()
        }
        assert control[name].config == expert.config
        own, others = dense(expert), dense(control[name])
        for module, update in own.items():
            assert np.linalg.norm(others[module]) == pytest.approx(np.linalg.norm(update), rel=1e-6)
            cosine = (others[module] * update).sum() / np.linalg.norm(update) ** 2
            assert abs(cosine) < 0.5


def test_random_like_draws_as_peft_does():
    """A fills (-1 / sqrt(I), 1 / sqrt(I)); no two modules or experts have the same numbers."""
    control = random_like(AdapterLibrary([random_adapter("a", 1, 16), random_adapter("b", 1, 16)]))
    seen = set()
    for adapter in control.values():
        for key, tensor in adapter.tensors.items():
            if "lora_A" in key:
                bound = tensor.shape[1] ** -0.5
                assert 0.95 * bound < tensor.abs().max() <= bound and abs(tensor.mean()) < 0.1 * bound
            seen.add(tensor.numpy().tobytes())
    assert len(seen) == 2 * len(control["a"].tensors)


def test_random_like_depends_on_seed_name_and_module_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = random_like(EXPERTS), random_like(EXPERTS), random_like(EXPERTS, seed=1)
    turned = random_like(EXPERTS.select(["c", "a"]))
    assert torch.equal(torch.get_rng_state(), state)
    for key, tensor in first["a"].tensors.items():
        assert torch.equal(tensor, again["a"].tensors[key]) and torch.equal(tensor, turned["a"].tensors[key])
        assert not torch.equal(tensor, other["a"].tensors[key])


def test_random_like_leaves_heads_and_zeros():
    head = torch.ones(2, 32)
    tensors = {**EXPERTS["a"].tensors, "base_model.model.score.weight": head}
    zeros = {key: tensor * 0 for key, tensor in tensors.items() if QUERIES[0] in key and "lora_B" in key}
    expert = replace(
        EXPERTS["a"], tensors={**tensors, **zeros}, config={**EXPERTS["a"].config, "modules_to_save": ["score"]}
    )
    found = random_like(AdapterLibrary([expert]))["a"]
    assert torch.equal(found.tensors["base_model.model.score.weight"], head)
    assert not dense(replace(found, tensors={k: t for k, t in found.tensors.items() if "score" not in k}))[
        QUERIES[0]
    ].any()
