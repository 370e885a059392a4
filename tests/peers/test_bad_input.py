"""Bad input: an error that names the argument, what was given and what is allowed, and nothing changed."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from peft_arrow import Adapter, AdapterRef, ArrowLoraConfig, ArrowLoraModel

from .adapters import assert_unchanged, logits, routed, snapshot
from .bases import gpt2, llama
from .damage import UNUSABLE


@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_third_adapter(tmp_path, trio, kind):
    """By both ways in, and as a later expert: the error names the adapter, the base or model is as it was."""
    make, message = UNUSABLE[kind]
    bad = make(tmp_path / "culprit")
    match = rf"(?s)culprit.*{message}"
    base = llama()
    before = snapshot(base)
    folders = [trio["one"], trio["two"], bad]
    with pytest.raises(ValueError, match=match):
        ArrowLoraModel.from_pretrained(base, folders)
    assert_unchanged(base, before)
    with pytest.raises(ValueError, match=match):
        get_peft_model(base, ArrowLoraConfig(adapters=folders, task_type="CAUSAL_LM"))
    assert_unchanged(base, before)
    model = routed(trio)
    expected, state = logits(model), snapshot(model)
    with pytest.raises(ValueError, match=match):
        model.add_expert(bad)
    assert_unchanged(model, state)
    assert model.expert_names == ["one", "two", "three"] and torch.equal(logits(model), expected)


# an argument -> (the value, the error, what the message must say)
ARGUMENTS = [
    ("top_k", 0, ValueError, r"top_k=0 .*whole number of at least 1"),
    ("top_k", 2.5, ValueError, r"top_k=2\.5 .*whole number of at least 1"),
    ("router_temperature", 0, ValueError, r"router_temperature=0 .*positive, finite"),
    ("router_temperature", float("nan"), ValueError, r"router_temperature=nan .*positive, finite"),
    ("router", "nobody", ValueError, r"router='nobody' is unknown; allowed are .*'arrow'.*'uniform'"),
    ("aggregation", "sum", ValueError, r"aggregation='sum' is unknown; allowed are 'output', 'parameter'"),
    ("prototype_update", "never", ValueError, r"prototype_update='never' is unknown; allowed are 'step', 'frozen'"),
    ("expert_names", ["a", "a", "b"], ValueError, r"expert_names holds 'a' more than once"),
    ("expert_names", ["a", "b"], ValueError, r"expert_names has 2 names for 3 adapters"),
    ("expert_names", ["a", "b", "../c"], ValueError, r"expert name '\.\./c' is not allowed; a name is 1 to 96"),
    ("trainable_experts", ["nobody"], ValueError, r"trainable_experts holds 'nobody'.*\['one', 'two', 'three'\]"),
    ("foo", 1, TypeError, r"unknown argument 'foo'; allowed are .*top_k|unexpected keyword argument 'foo'"),
    ("modules_to_save_from", "one", ValueError, r"modules_to_save_from='one' is not an expert with trained modules"),
]


@pytest.mark.parametrize(("argument", "value", "error", "message"), ARGUMENTS, ids=lambda v: str(v)[:20])
def test_bad_argument(trio, argument, value, error, message):
    base = llama()
    before = snapshot(base)
    with pytest.raises(error, match=message):
        ArrowLoraModel.from_pretrained(base, trio, **{argument: value})
    assert_unchanged(base, before)
    with pytest.raises(error, match=message):
        get_peft_model(base, ArrowLoraConfig(adapters=trio, task_type="CAUSAL_LM", **{argument: value}))
    assert_unchanged(base, before)


ADAPTERS = [
    ([], ValueError, "adapters is empty; at least one"),
    ({}, ValueError, "adapters is empty; at least one"),
    (5, TypeError, "adapters=5 is not allowed; pass a list of references or a dict"),
    ([5], TypeError, "adapters holds 5 of type int; allowed are a folder, a Hub id"),
    ("/no/where", ValueError, "the path '/no/where' does not exist"),
    (["/no/where"], ValueError, "the path '/no/where' does not exist"),
    ([AdapterRef("/no/where")], ValueError, "the path '/no/where' does not exist"),
    (["nowhere"], ValueError, "adapter 'nowhere': there is no such folder, and a Hub id has the form 'user/repo'"),
    (["no/where"], ValueError, "adapter 'no/where': there is no such folder, and the Hub answered"),
]


@pytest.mark.parametrize(("adapters", "error", "message"), ADAPTERS, ids=lambda v: str(v)[:20])
def test_bad_adapters(adapters, error, message):
    base = llama()
    before = snapshot(base)
    with pytest.raises(error, match=message):
        ArrowLoraModel.from_pretrained(base, adapters)
    assert_unchanged(base, before)
    with pytest.raises(error, match=message):
        get_peft_model(base, ArrowLoraConfig(adapters=adapters, task_type="CAUSAL_LM"))
    assert_unchanged(base, before)


def test_string_instead_of_a_list(trio):
    base = llama()
    before = snapshot(base)
    for given in (trio["one"], Path(trio["one"]), Adapter("x", {}, {})):
        with pytest.raises(ValueError, match=r"is a single adapter; pass a list of references"):
            ArrowLoraModel.from_pretrained(base, given)
    assert_unchanged(base, before)


@pytest.mark.parametrize("name", ["../x", "a/b", ".x", "", "a" * 97, 5])
def test_bad_name(trio, name):
    with pytest.raises(ValueError, match=rf"expert name {re.escape(repr(name))} is not allowed; a name is 1 to 96"):
        routed({name: trio["one"]})


@pytest.mark.parametrize("base", [5, None], ids=repr)
def test_bad_base(trio, base):
    with pytest.raises(TypeError, match=rf"base={base!r} is not allowed; it is a model, a Hub id or a folder"):
        ArrowLoraModel.from_pretrained(base, trio)


LIVE = [
    (lambda m: m.set_kernel("fast"), ValueError, r"kernel='fast' is unknown; allowed are 'auto', 'eager', 'folded'"),
    (lambda m: m.set_router("nobody"), ValueError, r"router='nobody' is unknown; allowed are 'arrow'"),
    (lambda m: m.set_router(top_k=0), ValueError, r"top_k=0 is not allowed"),
    (lambda m: m.set_router(router_temperature=float("nan")), ValueError, r"router_temperature=nan is not allowed"),
    (lambda m: m.set_router(foo=1), TypeError, r"unknown argument 'foo'; allowed are router, top_k, router_temp"),
    (lambda m: m.remove_expert("nobody"), ValueError, r"name='nobody' is not an expert; experts are \['one', 'two'"),
    (lambda m: m.add_expert("/no/where"), ValueError, r"the path '/no/where' does not exist"),
    (lambda m: m.export_lora("x", method="mean"), ValueError, r"method='mean' is unknown; allowed are 'svd', 'cat'"),
    (
        lambda m: m.export_lora("x", weights={"nobody": 1.0}),
        ValueError,
        r"weights holds 'nobody'.*experts are \['one'",
    ),
    (lambda m: m.export_lora("x", rank=0), ValueError, r"rank=0 is not allowed"),
    (lambda m: m.merge_and_unload(), NotImplementedError, r"cannot be merged.*export_lora\(folder\)"),
    (lambda m: m.merge_adapter(), NotImplementedError, r"cannot be merged.*export_lora\(folder\)"),
]


@pytest.mark.parametrize(("call", "error", "message"), LIVE, ids=[message[:18] for *_, message in LIVE])
def test_bad_call_on_a_live_model(trio, call, error, message):
    model = routed(trio)
    expected, state = logits(model), snapshot(model)
    config = copy.deepcopy(model.peft_config["default"].to_dict())
    with pytest.raises(error, match=message):
        call(model)
    assert_unchanged(model, state)
    assert model.peft_config["default"].to_dict() == config and torch.equal(logits(model), expected)


def test_a_routed_model_is_not_an_expert(tmp_path, trio):
    routed(trio).save_pretrained(tmp_path / "routed")
    with pytest.raises(ValueError, match=r"'routed'.*saved routed model.*PeftModel.from_pretrained\(base, folder\)"):
        routed([trio["one"], tmp_path / "routed"])


def test_duplicate_name_of_a_later_expert(trio):
    model = routed({"one": trio["one"]})
    with pytest.raises(ValueError, match=r"name='one' is already an expert; experts are \['one'\]"):
        model.add_expert(trio["two"], name="one")
    assert model.expert_names == ["one"]


def test_last_expert_cannot_be_removed(trio):
    model = routed([trio["one"]])
    state = snapshot(model)
    with pytest.raises(ValueError, match=r"name='one' is the last expert; delete_adapter\('default'\)"):
        model.remove_expert("one")
    assert_unchanged(model, state)


def test_config_survives_a_failure(tmp_path, trio):
    """One config, a base that it does not fit and one that it does."""
    config = ArrowLoraConfig(adapters=trio, top_k=1, task_type="CAUSAL_LM")
    before = copy.deepcopy({k: v for k, v in vars(config).items() if k != "base_model_name_or_path"})
    with pytest.raises(ValueError, match="another base"):
        get_peft_model(gpt2(), config)
    model = get_peft_model(llama(), config)
    assert torch.equal(logits(model), logits(routed(trio, top_k=1)))
    assert {k: v for k, v in vars(config).items() if k != "base_model_name_or_path"} == before
