"""A.8: experts and whole libraries come, go and stand side by side, and the config always says what is there."""

from __future__ import annotations

import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale

from peft_arrow import ArrowLoraConfig, ArrowLoraModel

from .adapters import (
    TOLERANCE,
    VISIBLE,
    assert_layers_match,
    assert_unchanged,
    difference,
    expert_files,
    logits,
    plain,
    routed,
    snapshot,
)
from .bases import llama, token_ids


@pytest.fixture
def model(trio):
    return routed(trio, top_k=2)


def saved_names(model, folder) -> list[str]:
    model.save_pretrained(folder)
    return expert_files(str(folder))[0]["expert_names"]


def test_remove_expert(tmp_path, trio, model):
    logits(model)
    model.remove_expert("three")
    rest = [trio["one"], trio["two"]]
    assert torch.equal(logits(model), logits(routed(rest, top_k=2)))
    assert model.expert_names == saved_names(model, tmp_path / "routed") == ["one", "two"]
    again = PeftModel.from_pretrained(llama(), tmp_path / "routed")
    assert torch.equal(logits(again), logits(model))


def test_remove_the_only_expert_of_some_layers(mixed):
    """Layers that nobody adapts any more become the base's own modules again."""
    model = routed({"attention": mixed["attention"], "mlp": mixed["mlp"]}, top_k=1)
    model.remove_expert("mlp")
    assert torch.equal(logits(model), logits(routed([mixed["attention"]], top_k=1)))
    assert not any("mlp" in name for name in model.base_model.routed_layers())
    model.add_expert(mixed["mlp"])
    assert torch.equal(logits(model), logits(routed([mixed["attention"], mixed["mlp"]], top_k=1)))


def test_delete_adapter(trio, model):
    """PEFT's own call removes a whole library; the others go on."""
    before = logits(model)
    model.add_adapter("second", ArrowLoraConfig(adapters=[trio["three"]]))
    model.delete_adapter("second")
    assert torch.equal(logits(model), before) and set(model.peft_config) == {"default"}


def test_what_is_added_later_is_no_expert(tmp_path, trio, model):
    """Another library of the same model, loaded or made, does not join the pool."""
    before = logits(model)
    routed([trio["three"]]).save_pretrained(tmp_path / "other")
    model.load_adapter(str(tmp_path / "other"), "loaded")
    model.add_adapter("made", ArrowLoraConfig(num_experts=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert torch.equal(logits(model), before)
    assert model.expert_names == ["one", "two", "three"]


def test_base_with_its_own_adapters_is_refused(trio):
    base = llama()
    base.load_adapter(trio["one"], adapter_name="mine")
    before = snapshot(base)
    with pytest.raises(ValueError, match="base already carries PEFT adapters.*delete_adapter"):
        ArrowLoraModel.from_pretrained(base, [trio["two"]])
    assert_unchanged(base, before)


def test_no_name_is_magic(trio):
    """PEFT never routes to an adapter called `gks_7`."""
    names = ("gks_7", "arrow_router", "task_0")
    model = routed(dict(zip(names, trio.values(), strict=True)), top_k=1)
    assert torch.equal(logits(model), logits(routed(trio, top_k=1)))
    with model.trace_routing() as trace:
        logits(model)
    chosen = torch.cat([trace[name].top_k_index.flatten() for name in trace])
    assert set(chosen.tolist()) == {0, 1, 2}


def test_add_expert_of_another_rank_and_other_modules(tmp_path, trio, mixed, model):
    """It is routed wherever it has weights, also where no expert was before."""
    logits(model)
    model.add_expert(mixed["all"])
    model.add_expert(mixed["mlp"], name="feed")
    folders = [*trio.values(), mixed["all"], mixed["mlp"]]
    assert torch.equal(logits(model), logits(routed(folders, top_k=2)))
    assert_layers_match(model, folders, top_k=2)
    assert saved_names(model, tmp_path / "routed") == ["one", "two", "three", "all", "feed"]


def test_one_by_one_is_all_at_once(trio):
    model = routed([trio["one"]], top_k=2)
    for name in ("two", "three"):
        logits(model)
        model.add_expert(trio[name])
    assert torch.equal(logits(model), logits(routed(trio, top_k=2)))


def test_two_routers_over_the_same_files(trio, model):
    """Independent: each has its own experts and settings, and switching is exact."""
    before = logits(model)
    model.add_adapter("second", ArrowLoraConfig(adapters=[trio["two"], trio["one"]], top_k=1))
    model.set_adapter("second")
    assert model.expert_names == ["two", "one"]
    assert torch.equal(logits(model), logits(routed([trio["two"], trio["one"]], top_k=1)))
    model.set_router("uniform")
    model.set_adapter("default")
    assert torch.equal(logits(model), before)
    assert model.peft_config["default"].router == "arrow"


def test_settings_change_at_run_time(tmp_path, trio, model):
    model.set_router(top_k=1, router_temperature=0.25)
    assert torch.equal(logits(model), logits(routed(trio, top_k=1, router_temperature=0.25)))
    model.save_pretrained(tmp_path / "routed")
    again = PeftModel.from_pretrained(llama(), tmp_path / "routed")
    assert torch.equal(logits(again), logits(model)) and again.peft_config["default"].top_k == 1
    for wrong, error in (({"router": "nobody"}, ValueError), ({"top_k": 0}, ValueError), ({"seed": 1}, TypeError)):
        with pytest.raises(error, match=re.escape(next(iter(wrong)))):
            model.set_router(**wrong)
    assert torch.equal(logits(again), logits(model))


MERGES = {
    "merge_adapter": lambda m: m.merge_adapter(),
    "merge_adapter of one": lambda m: m.merge_adapter(["default"]),
    "merge_and_unload": lambda m: m.merge_and_unload(),
    "merge_and_unload of one": lambda m: m.merge_and_unload(adapter_names=["one"]),
}


@pytest.mark.parametrize("call", MERGES)
def test_merging_is_refused(model, call):
    before, state = logits(model), snapshot(model)
    with pytest.raises(NotImplementedError, match=r"cannot be merged.*export_lora"):
        MERGES[call](model)
    assert_unchanged(model, state)
    assert torch.equal(logits(model), before)


def test_set_scale(trio, model):
    """The routed update is scaled as a whole; PEFT's helper for LoRA layers says that it does not know these."""
    before, base = logits(model), logits(llama())
    model.set_scale(0)
    assert difference(logits(model), base) == 0
    model.set_scale(0.5)
    halved = logits(model)
    assert difference(halved, base) > VISIBLE and difference(halved, before) > VISIBLE
    model.set_scale(1)
    assert torch.equal(logits(model), before)
    with (
        pytest.raises(ValueError, match="only supported for models with `LoraLayer`"),
        rescale_adapter_scale(model, 0),
    ):
        pass


def test_disable_and_unload(trio, model):
    routed_logits, base_logits = logits(model), logits(llama())
    with model.disable_adapter():
        assert torch.equal(logits(model), base_logits)
    assert torch.equal(logits(model), routed_logits)
    base = model.unload()
    assert torch.equal(logits(base), base_logits) and type(base.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert torch.equal(logits(ArrowLoraModel.from_pretrained(base, trio, top_k=2)), routed_logits)


def test_one_expert_at_a_time(trio, model):
    """What `set_adapter('task_i')` is for in PEFT: a row that goes to one expert is the plain adapter's."""
    ids = token_ids()
    for name, folder in trio.items():
        with torch.no_grad():
            found = model(ids, adapter_names=[name, name]).logits
        assert difference(found, logits(plain(folder))) <= TOLERANCE


def test_mixed_batch(trio, model):
    ids = token_ids(rows=3)
    with torch.no_grad():
        found = model(ids, adapter_names=["default", "two", "__base__"]).logits
        assert difference(found[:1], model(ids).logits[:1]) <= TOLERANCE
        assert difference(found[1:2], plain(trio["two"])(ids).logits[1:2]) <= TOLERANCE
        assert difference(found[2:], llama()(ids).logits[2:]) <= TOLERANCE
    with pytest.raises(ValueError, match=r"adapter_names holds 'nobody'.*allowed: .*'two'"):
        model(ids, adapter_names=["default", "nobody", "__base__"])


@pytest.mark.parametrize("names", [["one"], ["one"] * 4])
def test_mixed_batch_needs_a_name_per_row(model, names):
    """As in PEFT: fewer names than rows would leave rows to the base without a word."""
    with pytest.raises(ValueError, match=rf"adapter_names has {len(names)} names .*for 3 rows"):
        model(token_ids(rows=3), adapter_names=names)


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_with_a_name_per_row(trio, model, beams):
    ids = token_ids(rows=3)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    found = model.generate(input_ids=ids, adapter_names=["default", "two", "__base__"], **options)
    for row, alone in enumerate((model, plain(trio["two"]), llama())):
        expected = alone.generate(input_ids=ids, **options)
        assert torch.equal(found[row], expected[row])


def test_trainable_library_beside_a_frozen_one(trio):
    """Only the active library trains."""
    model = get_peft_model(llama(), ArrowLoraConfig(adapters=trio))
    model.add_adapter("second", ArrowLoraConfig(adapters=[trio["one"]]))
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".second." in name)
    model.set_adapter("second")
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"second"}
