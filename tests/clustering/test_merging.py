"""Merged adapters against the mean of dense updates and the tail of their singular values; libraries of them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel

from peft_arrow import AdapterLibrary, MBCClusterer, merge_adapters
from peft_arrow.library.manifest import Origin
from tests.clustering.planted import dense, planted, random_adapter
from tests.pico import pico_base


MEMBERS = {"a": random_adapter("a", 1, 2), "b": random_adapter("b", 2, 8), "c": random_adapter("c", 3, 4)}


def mean_update(members, weights) -> dict[str, np.ndarray]:
    updates = [dense(member) for member in members]
    return {module: sum(w * update[module] for w, update in zip(weights, updates)) for module in updates[0]}


@pytest.mark.parametrize("weights", [None, {"a": 0.5, "c": -2.0}, [1, 2, 3]])
def test_the_whole_rank_is_exact(weights):
    merged = merge_adapters(MEMBERS, weights, rank=14)
    numbers = [1 / 3] * 3 if weights is None else [0.5, 0, -2.0] if isinstance(weights, dict) else weights
    expected, found = mean_update(MEMBERS.values(), numbers), dense(merged.adapter)
    for module, update in expected.items():
        np.testing.assert_allclose(found[module], update, atol=1e-5 * abs(update).max())
    assert merged.lost_norm < 1e-6


@pytest.mark.parametrize("rank", [None, 1, 5])
def test_a_cut_rank_is_the_best_of_its_rank(rank):
    """Eckart and Young: the error is the norm of the singular values that are cut off."""
    merged = merge_adapters(MEMBERS, rank=rank)
    kept = rank or 8
    assert merged.adapter.config["r"] == kept
    lost = whole = 0.0
    for module, update in mean_update(MEMBERS.values(), [1 / 3] * 3).items():
        values = np.linalg.svd(update, compute_uv=False)
        error = np.linalg.norm(dense(merged.adapter)[module] - update)
        assert error == pytest.approx(np.linalg.norm(values[kept:]), rel=1e-4)
        lost, whole = lost + (values[kept:] ** 2).sum(), whole + (values**2).sum()
    assert merged.lost_norm == pytest.approx((lost / whole) ** 0.5, rel=1e-6)


def test_a_missing_module_counts_as_zero_and_ranks_are_padded():
    one = random_adapter("one", 1, 3, modules=["model.layers.0.self_attn.q_proj"])
    both = {"one": one, "more": random_adapter("more", 2, 40)}
    found = dense(merge_adapters(both).adapter)
    mean = {module: update / 2 for module, update in dense(both["more"]).items()}
    mean["model.layers.0.self_attn.q_proj"] += dense(one)["model.layers.0.self_attn.q_proj"] / 2
    for module, update in mean.items():
        np.testing.assert_allclose(found[module], update, atol=1e-4)
    shapes = {tensor.shape[0] for key, tensor in merge_adapters(both).adapter.tensors.items() if "lora_A" in key}
    assert shapes == {40}


def test_merge_experts(tmp_path):
    """A library of merged experts: saved with a card that tells how, read back, loaded by plain PEFT."""
    library, _ = planted(0, 3, 4)
    members = {name: replace(one, origin=Origin(license="mit", datasets=("me/x",))) for name, one in library.items()}
    clusterer = MBCClusterer(3).fit(members)
    merged = clusterer.merge_experts()
    assert list(merged) == ["cluster_0", "cluster_1", "cluster_2"] and merged is clusterer.library_
    assert all(0 < lost < 0.6 for lost in clusterer.lost_norm_.values())
    for name, names in clusterer.clusters_.items():
        again = merge_adapters(library.select(names))
        assert clusterer.lost_norm_[name] == pytest.approx(again.lost_norm)
        assert merged[name].origin == Origin(license="mit", task="mean of " + ", ".join(names), datasets=("me/x",))
    merged.save_pretrained(tmp_path / "merged")
    saved = json.loads((tmp_path / "merged/library.json").read_text())
    assert saved["made"]["clusters"] == clusterer.clusters_ and saved["made"]["seeds"] == [42]
    assert saved["made"]["embedding"] == "delta" and "peft-arrow" in saved["made"]["versions"]
    assert AdapterLibrary.from_pretrained(tmp_path / "merged").notes.made == saved["made"]
    model = PeftModel.from_pretrained(pico_base(), tmp_path / "merged", subfolder="experts/cluster_1")
    module = "model.layers.1.self_attn.q_proj"
    expected = torch.tensor(dense(merged["cluster_1"])[module], dtype=torch.float32)
    layer = model.get_submodule(f"base_model.model.{module}")
    torch.testing.assert_close(layer.get_delta_weight("default"), expected, rtol=1e-4, atol=1e-5)
    assert all(adapter.config["r"] == 2 for adapter in clusterer.merge_experts(rank=2).values())


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        ({}, {}, "adapters is empty"),
        (MEMBERS, {"rank": 0}, "rank=0 is not allowed"),
        (MEMBERS, {"weights": [1.0]}, "weights has 1 numbers for 3 adapters"),
        (MEMBERS, {"weights": {"d": 1.0}}, "weights holds 'd'"),
        (MEMBERS, {"name": "../x"}, "is not allowed"),
        ({**MEMBERS, "d": random_adapter("d", 4, task_type="SEQ_CLS")}, {}, "task_type is 'SEQ_CLS' in 'd'"),
        ({**MEMBERS, "d": random_adapter("d", 4, init_lora_weights="pissa")}, {}, "does not follow from its files"),
    ],
)
def test_bad_members(members, options, message):
    with pytest.raises(ValueError, match=message):
        merge_adapters(members, **options)


def test_whole_modules_are_not_merged():
    tensors = {**MEMBERS["a"].tensors, "base_model.model.score.weight": torch.ones(2, 32)}
    config = {**MEMBERS["a"].config, "modules_to_save": ["score"]}
    with pytest.raises(ValueError, match="it also holds score.weight, trained or saved in full"):
        merge_adapters([replace(MEMBERS["a"], tensors=tensors, config=config)])


def test_bars_for_many(capsys):
    """One for each thing that takes long, from 20 adapters on."""
    library, _ = planted(0, 4, 5)
    MBCClusterer(4).fit(library).merge_experts()
    shown = capsys.readouterr().err
    assert all(name in shown for name in ("Reading", "Comparing updates", "Sketching", "Merging clusters"))
    MBCClusterer(2).fit(library.select(list(library)[:19])).merge_experts()
    assert capsys.readouterr().err == ""
