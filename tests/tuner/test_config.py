"""The config: what it refuses, what it keeps, what it never changes."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model

from peft_arrow import ArrowLoraConfig, ArrowLoraModel
from tests.pico import pico_base


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": 0}, "top_k=0 is not allowed; it must be a whole number of at least 1"),
        ({"top_k": 2.5}, "top_k=2.5 is not allowed"),
        ({"top_k": -1}, "top_k=-1 is not allowed"),
        ({"top_k": True}, "top_k=True is not allowed"),
        ({"router_temperature": 0}, "router_temperature=0 is not allowed; it must be a positive, finite number"),
        ({"router_temperature": float("inf")}, "router_temperature=inf is not allowed"),
        ({"router_temperature": "1"}, "router_temperature='1' is not allowed"),
        ({"router": "arow"}, "router='arow' is unknown; allowed are 'arrow', 'uniform'"),
        ({"aggregation": "mean"}, "aggregation='mean' is unknown; allowed are 'output', 'parameter'"),
        ({"prototype_update": "never"}, "prototype_update='never' is unknown; allowed are 'step', 'frozen'"),
        ({"num_experts": 0}, "num_experts=0 is not allowed"),
        ({"r": 0}, "r=0 is not allowed"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0 is not allowed"),
        ({"expert_names": ["a", "a"]}, "expert_names holds 'a' more than once"),
        ({"expert_names": ["a/b"]}, "expert name 'a/b' is not allowed"),
        ({"expert_names": ["a"], "num_experts": 2}, "expert_names has 1 names for num_experts=2"),
        ({"trainable_experts": "some"}, "trainable_experts='some' is not allowed"),
        ({"adapters": []}, "adapters is empty"),
        ({"adapters": ["./x"], "num_experts": 2}, "exclude each other"),
        ({"format_version": 7}, "format_version=7 is newer than 2"),
    ],
)
def test_refusals(options, message):
    """One sentence with the argument, the value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        ArrowLoraConfig(**options)


def test_neither_adapters_nor_experts():
    """Said when the model is made, and the base stays bare."""
    base = pico_base()
    before = [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match="neither adapters nor num_experts"):
        get_peft_model(base, ArrowLoraConfig(target_modules=["q_proj"]))
    assert [type(module) for module in base.modules()] == before


def test_unknown_option_lists_the_known(adapter_folders):
    """from_pretrained takes fields of the config and nothing else."""
    with pytest.raises(TypeError, match="unknown argument 'topk'; allowed are .*router, top_k"):
        ArrowLoraModel.from_pretrained(pico_base(), adapter_folders, topk=2)


def test_unknown_trainable_expert(adapter_folders):
    """A name that is not there."""
    with pytest.raises(ValueError, match="trainable_experts holds 'nobody', which is not an expert"):
        ArrowLoraModel.from_pretrained(pico_base(), adapter_folders, trainable_experts=["nobody"])


def test_the_users_config_is_not_changed(adapter_folders):
    """Apart from the base's name, which PEFT writes into every config; and it can serve two models."""
    config = ArrowLoraConfig(adapters=adapter_folders, top_k=2)
    before = copy.deepcopy(config.to_dict())
    one, two = get_peft_model(pico_base(), config).eval(), get_peft_model(pico_base(seed=1), config).eval()
    after = config.to_dict()
    assert {k: v for k, v in after.items() if k != "base_model_name_or_path"} == {
        k: v for k, v in before.items() if k != "base_model_name_or_path"
    }
    one.remove_expert("sql")
    assert one.expert_names == ["plurals", "dates"] and two.expert_names == ["plurals", "dates", "sql"]


def test_get_peft_model_and_from_pretrained_agree(adapter_folders):
    """The same logits; one trains, the other is for inference."""
    ids = torch.arange(8)[None] + 5
    trained = get_peft_model(pico_base(), ArrowLoraConfig(adapters=adapter_folders, top_k=2))
    loaded = ArrowLoraModel.from_pretrained(pico_base(), adapter_folders, top_k=2)
    assert type(trained) is type(loaded)
    with torch.no_grad():
        assert torch.equal(trained.eval()(ids).logits, loaded(ids).logits)
    assert any(p.requires_grad for p in trained.parameters())
    assert not any(p.requires_grad for p in loaded.parameters())


def test_fresh_experts_then_an_adapter_round_trip(tmp_path, adapter_folders):
    """Fresh experts have every target, a loaded one its own modules; the mixture saves and loads."""
    config = ArrowLoraConfig(
        expert_names=["new", "newer"], r=4, target_modules=["q_proj"], init_weights=False, task_type="CAUSAL_LM"
    )
    model = get_peft_model(pico_base(), config).eval()
    model.add_expert(adapter_folders["sql"])
    assert model.expert_names == ["new", "newer", "sql"]
    ids = torch.arange(8)[None] + 5
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(str(tmp_path)).num_experts == 3
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(pico_base(), tmp_path)(ids).logits, expected)


def test_experts_that_must_not_train_stay_frozen_when_loaded_for_inference(adapter_folders):
    """There they share a bank with those that may, so nothing becomes trainable by set_adapter."""
    model = ArrowLoraModel.from_pretrained(pico_base(), adapter_folders, trainable_experts=["sql"])
    model.set_adapter("default")
    assert not any(p.requires_grad for p in model.parameters())
    model.train()
    with pytest.raises(RuntimeError, match="is_trainable=True"):
        model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()


def test_local_paths_are_not_saved(tmp_path, adapter_folders):
    """A saved model names the folders it came from, not where they lay on this disk."""
    model = ArrowLoraModel.from_pretrained(pico_base(), adapter_folders)
    model.save_pretrained(tmp_path)
    assert str(next(iter(adapter_folders.values()))) not in (tmp_path / "adapter_config.json").read_text()
    assert model.peft_config["default"].expert_sources == ["plurals", "dates", "sql"]
