"""Adding, removing, exporting experts; routing settings of a live model."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from peft_arrow import ArrowLoraConfig, ArrowLoraModel
from peft_arrow.tuner import prototypes
from tests.pico import pico_adapter, pico_base


@pytest.fixture
def ids():
    """Two rows of eleven tokens."""
    return torch.randint(0, 100, (2, 11), generator=torch.Generator().manual_seed(3))


def logits_of(model, ids):
    """Logits without gradients."""
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("is_trainable", [False, True])
def test_add_equals_creating_with_it(adapter_folders, ids, is_trainable):
    """An expert added later, on new modules too, is the same as one given at the start; removing it undoes it."""
    names = list(adapter_folders)
    first = {name: adapter_folders[name] for name in names[:2]}
    model = ArrowLoraModel.from_pretrained(pico_base(), first, top_k=2, is_trainable=is_trainable).eval()
    before = logits_of(model, ids)
    assert "model.layers.0.mlp.down_proj" not in model.base_model.routed_layers()
    model.add_expert(adapter_folders["sql"])
    whole = ArrowLoraModel.from_pretrained(pico_base(), adapter_folders, top_k=2, is_trainable=is_trainable).eval()
    assert model.expert_names == whole.expert_names == names
    assert float((logits_of(model, ids) - logits_of(whole, ids)).abs().max()) < 1e-6
    assert float((logits_of(model, ids) - before).abs().max()) > 1e-4
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        p.numel() for p in whole.parameters() if p.requires_grad
    )
    model.remove_expert("sql")
    assert "model.layers.0.mlp.down_proj" not in model.base_model.routed_layers()
    assert torch.equal(logits_of(model, ids), before)


def test_adding_builds_only_the_new_prototypes(adapter_folders, ids, monkeypatch):
    """The others' prototypes are kept."""
    built = []
    original = prototypes.top_right_singular_vectors

    def count(lora_A, lora_B):
        built.append(len(lora_A))
        return original(lora_A, lora_B)

    monkeypatch.setattr(prototypes, "top_right_singular_vectors", count)
    model = ArrowLoraModel.from_pretrained(
        pico_base(), {name: adapter_folders[name] for name in ("plurals", "dates")}, top_k=2
    )
    logits_of(model, ids)
    assert sum(built) == 4 + 6
    built.clear()
    model.add_expert(adapter_folders["sql"], name="new")
    logits_of(model, ids)
    assert sum(built) == 4
    built.clear()
    model.remove_expert("plurals")
    logits_of(model, ids)
    assert sum(built) == 0


def test_a_removed_middle_expert_leaves_the_others(tmp_path, adapter_folders, ids):
    """Positions move up, weights stay with their names, and the edited model saves and loads."""
    model = ArrowLoraModel.from_pretrained(pico_base(), adapter_folders, top_k=2)
    logits_of(model, ids)
    model.remove_expert("dates")
    fresh = {name: folder for name, folder in adapter_folders.items() if name != "dates"}
    expected = logits_of(ArrowLoraModel.from_pretrained(pico_base(), fresh, top_k=2), ids)
    assert float((logits_of(model, ids) - expected).abs().max()) < 1e-6
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(PeftModel.from_pretrained(pico_base(), tmp_path), ids), logits_of(model, ids))


def test_editing_a_second_library_on_other_modules(adapter_folders, ids):
    """The first routed layer may not have the active adapter; the other library is left alone, the scale is kept."""
    model = ArrowLoraModel.from_pretrained(pico_base(), {"dates": adapter_folders["dates"]}, top_k=1)
    before = logits_of(model, ids)
    only_down = ArrowLoraConfig(adapters=[adapter_folders["sql"]], target_modules=["down_proj"], task_type="CAUSAL_LM")
    model.add_adapter("second", only_down)
    model.set_adapter("second")
    model.set_scale(0.5)
    model.add_expert(adapter_folders["plurals"])
    assert model.expert_names == ["sql", "plurals"]
    layers = model.base_model.routed_layers()
    assert {layers[name].scales["second"] for name in layers if "second" in layers[name].experts} == {0.5}
    model.remove_expert("sql")
    model.set_scale(1.0)
    plain = PeftModel.from_pretrained(pico_base(), adapter_folders["plurals"])
    assert float((logits_of(model, ids) - logits_of(plain, ids)).abs().max()) < 1e-5
    model.set_adapter("default")
    assert torch.equal(logits_of(model, ids), before)


def test_a_bad_expert_changes_nothing(tmp_path, adapter_folders, ids):
    """add_expert checks before it touches a layer."""
    model = ArrowLoraModel.from_pretrained(pico_base(), adapter_folders, top_k=2)
    before, names = logits_of(model, ids), model.expert_names
    bad = pico_adapter(tmp_path / "bad", seed=1, r=4, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(ValueError, match="use_dora=True"):
        model.add_expert(bad)
    with pytest.raises(ValueError, match="name='sql' is already an expert"):
        model.add_expert(adapter_folders["dates"], name="sql")
    with pytest.raises(ValueError, match="does not exist"):
        model.add_expert("./nowhere")
    assert model.expert_names == names
    assert torch.equal(logits_of(model, ids), before)


def test_removing_the_last_or_an_unknown_expert_is_refused(adapter_folders):
    """Both errors name the expert."""
    model = ArrowLoraModel.from_pretrained(pico_base(), {"only": adapter_folders["sql"]})
    with pytest.raises(ValueError, match="'only' is the last expert"):
        model.remove_expert("only")
    with pytest.raises(ValueError, match="name='other' is not an expert; experts are"):
        model.remove_expert("other")


def dense_mean(model, weights):
    """module -> weighted sum of the dense updates."""
    found = {}
    for name, layer in model.base_model.routed_layers().items():
        experts = layer.experts["default"]
        total = 0
        for (A, B), position, scaling in zip(
            layer.expert_factors("default"), experts.positions, experts.scalings, strict=True
        ):
            total = total + weights[position] * scaling * (B.detach().double() @ A.detach().double())
        found[name] = total
    return found


@pytest.mark.parametrize("weights", ["uniform", {"plurals": 0.5, "sql": -2.0}])
@pytest.mark.parametrize("method, rank", [("cat", None), ("svd", 14), ("svd", 3), ("svd", None)])
def test_export_is_the_weighted_mean(tmp_path, adapter_folders, ids, weights, method, rank):
    """Plain PEFT loads it; its update is the mean, or its best approximation of that rank, with the loss reported."""
    model = ArrowLoraModel.from_pretrained(pico_base(), adapter_folders, top_k=2)
    report = model.export_lora(tmp_path / "lora", weights=weights, rank=rank, method=method)
    vector = [1 / 3] * 3 if weights == "uniform" else [0.5, 0.0, -2.0]
    expected = dense_mean(model, vector)
    plain = PeftModel.from_pretrained(pico_base(), tmp_path / "lora")
    kept = lost = 0.0
    for name, dense in expected.items():
        layer = plain.base_model.model.get_submodule(name)
        got = layer.get_delta_weight("default").double()
        singular = torch.linalg.svdvals(dense)
        r = layer.lora_A["default"].weight.shape[0]
        tail = float(singular[r:].square().sum())
        assert float((got - dense).square().sum()) == pytest.approx(tail, abs=1e-8, rel=1e-3)
        kept, lost = kept + float(singular[:r].square().sum()), lost + tail
    assert report["lost_norm"] == pytest.approx((lost / (kept + lost)) ** 0.5, abs=1e-4)
    assert report["rank"] == (16 if method == "cat" else rank or 8)
    config = plain.peft_config["default"]
    assert config.r == report["rank"] and not config.rank_pattern and not config.alpha_pattern
    assert {layer.r["default"] for layer in plain.modules() if hasattr(layer, "lora_A")} == {report["rank"]}


def test_export_refuses_nonsense(tmp_path, adapter_folders):
    """Each error names the argument and the value, and nothing is written."""
    model = ArrowLoraModel.from_pretrained(pico_base(), adapter_folders)
    for options, message in [
        ({"weights": {"nobody": 1.0}}, "weights holds 'nobody'"),
        ({"weights": "mean"}, "weights='mean' is not allowed"),
        ({"method": "ties"}, "method='ties' is unknown"),
        ({"rank": 0}, "rank=0 is not allowed"),
        ({"rank": 4, "method": "cat"}, "rank=4 is not allowed"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.export_lora(tmp_path / "lora", **options)
    assert not (tmp_path / "lora").exists()


def test_merging_says_why_and_what_to_do(adapter_folders):
    """PEFT's default is an empty NotImplementedError."""
    model = ArrowLoraModel.from_pretrained(pico_base(), adapter_folders)
    with pytest.raises(NotImplementedError, match="export_lora"):
        model.merge_and_unload()
    with pytest.raises(NotImplementedError, match="export_lora"):
        model.merge_adapter()


def test_unload_gives_the_base_back(adapter_folders, ids):
    """And the same base can be routed again."""
    base = pico_base()
    expected = logits_of(base, ids)
    bare = ArrowLoraModel.from_pretrained(base, adapter_folders, top_k=2).unload()
    assert torch.equal(logits_of(bare, ids), expected)
    again = ArrowLoraModel.from_pretrained(bare, adapter_folders, top_k=2)
    other = ArrowLoraModel.from_pretrained(pico_base(), adapter_folders, top_k=2)
    assert torch.equal(logits_of(again, ids), logits_of(other, ids))


def test_set_router_keeps_what_is_not_named(adapter_folders, ids):
    """And refuses what it does not know, leaving everything as it was."""
    model = ArrowLoraModel.from_pretrained(pico_base(), adapter_folders, top_k=2, router_temperature=0.7)
    before = logits_of(model, ids)
    model.set_router("uniform")
    config = model.peft_config["default"]
    assert (config.router, config.top_k, config.router_temperature) == ("uniform", 2, 0.7)
    assert float((logits_of(model, ids) - before).abs().max()) > 1e-4
    for call, message in [
        (lambda: model.set_router("arow"), "router='arow' is unknown; allowed are 'arrow', 'uniform'"),
        (lambda: model.set_router(top_k=0), "top_k=0 is not allowed"),
        (lambda: model.set_router(router_temperature=float("nan")), "router_temperature=nan is not allowed"),
        (lambda: model.set_kernel("fast"), "kernel='fast' is unknown; allowed are 'auto', 'eager', 'folded'"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="unknown argument 'topk'"):
        model.set_router("arrow", topk=3)
    model.set_router("arrow")
    assert torch.equal(logits_of(model, ids), before)


def test_set_scale_scales_the_routed_update(adapter_folders, ids):
    """0 is the base, 1 the original."""
    model = ArrowLoraModel.from_pretrained(pico_base(), adapter_folders, top_k=2)
    before = logits_of(model, ids)
    model.set_scale(0.0)
    assert torch.equal(logits_of(model, ids), logits_of(pico_base(), ids))
    model.set_scale(1.0)
    assert torch.equal(logits_of(model, ids), before)


def test_disable_adapter_is_the_base(adapter_folders, ids):
    """Inside the context the model is the base, after it the routed model again."""
    model = ArrowLoraModel.from_pretrained(pico_base(), adapter_folders, top_k=2)
    before = logits_of(model, ids)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, ids), logits_of(pico_base(), ids))
    assert torch.equal(logits_of(model, ids), before)
