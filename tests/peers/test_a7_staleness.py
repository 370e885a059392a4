"""A.7: what the model computes is always that of its current weights, however they got there."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from peft.utils.hotswap import hotswap_adapter

from peft_arrow import ArrowLoraConfig

from .adapters import TOLERANCE, VISIBLE, adapter, assert_layers_match, difference, logits, routed
from .bases import llama, token_ids


@pytest.fixture
def others(tmp_path) -> list[str]:
    """Adapters of the same shapes as `trio`, with other values."""
    return [adapter(tmp_path / f"other-{seed}", seed=seed, r=4) for seed in (21, 22, 23)]


@pytest.fixture
def other(tmp_path, others):
    """A model of them, saved, and its logits: (folder, logits)."""
    model = routed(others, top_k=1)
    model.save_pretrained(tmp_path / "other")
    return str(tmp_path / "other"), logits(model)


@pytest.fixture
def used(trio, other):
    """A model whose prototypes were built by use, before anything is loaded into it."""
    model = routed(list(trio.values()), top_k=1)
    assert difference(logits(model), other[1]) > VISIBLE
    return model


def step(model, lr: float = 0.5) -> None:
    """One step of plain gradient descent."""
    ids = token_ids()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_fresh(model, folder) -> None:
    """The model answers as one that is made anew from its saved weights and builds its prototypes there."""
    found = logits(model)
    model.refresh_prototypes()
    assert difference(logits(model), found) == 0
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(llama(), folder)
    again.refresh_prototypes()
    assert difference(logits(again), found) <= TOLERANCE


@pytest.mark.parametrize("experts", [None, ["two"]], ids=["all", "one of three"])
def test_after_training_through_the_router(tmp_path, trio, experts):
    model = get_peft_model(llama(), ArrowLoraConfig(adapters=trio, top_k=1, trainable_experts=experts))
    before = logits(model)
    for _ in range(3):
        step(model)
    assert difference(logits(model), before) > VISIBLE
    assert_fresh(model, tmp_path / "routed")


def test_prototypes_between_steps_stay(trio):
    """They follow the optimizer, not the forward: evaluation twice, and accumulation, see the same."""
    model = get_peft_model(llama(), ArrowLoraConfig(adapters=trio, top_k=1))
    layer = model.base_model.routed_layers()["model.layers.0.self_attn.q_proj"]
    logits(model)
    built = layer.arrow_lora_router["default"].weight.clone()
    ids = token_ids()
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
    assert torch.equal(layer.arrow_lora_router["default"].weight, built)
    step(model)
    logits(model)
    assert not torch.equal(layer.arrow_lora_router["default"].weight, built)


def test_fresh_expert_used_before_it_is_trained(tmp_path):
    """An expert with B = 0 has a unit prototype, so that it can be chosen, and another one after training."""
    config = ArrowLoraConfig(num_experts=3, r=4, target_modules=["q_proj"], top_k=1, task_type="CAUSAL_LM")
    model = get_peft_model(llama(), config)
    assert difference(logits(model), logits(llama())) == 0
    layer = model.base_model.routed_layers()["model.layers.0.self_attn.q_proj"]
    norms = layer.arrow_lora_router["default"].weight.norm(dim=1)
    assert torch.allclose(norms, torch.ones(3), atol=1e-6)
    for _ in range(3):
        step(model, lr=5.0)
    assert difference(logits(model), logits(llama())) > VISIBLE
    assert_fresh(model, tmp_path / "routed")


def test_load_state_dict(used, others, other):
    used.load_state_dict(routed(others, top_k=1).state_dict())
    assert torch.equal(logits(used), other[1])


def test_load_state_dict_of_factors_alone(used, others, other):
    """A state dict without prototypes: they are built from what was loaded."""
    state = {k: v for k, v in routed(others, top_k=1).state_dict().items() if "arrow_lora_router" not in k}
    used.load_state_dict(state, strict=False)
    assert torch.equal(logits(used), other[1])


def test_load_adapter_over_an_existing_name(used, other):
    used.load_adapter(other[0], "default")
    assert torch.equal(logits(used), other[1])


def test_set_peft_model_state_dict(used, other):
    set_peft_model_state_dict(used, load_peft_weights(other[0]), "default")
    assert torch.equal(logits(used), other[1])


def test_in_place_copy(used, other, others):
    """`copy_` under no_grad, as hand-written loading code does it."""
    source = dict(routed(others, top_k=1).named_parameters())
    with torch.no_grad():
        for name, parameter in used.named_parameters():
            if "arrow_lora_A" in name or "arrow_lora_B" in name:
                parameter.copy_(source[name])
    assert torch.equal(logits(used), other[1])


def test_edits_through_data_are_a_stated_limit(used, other, others):
    """Nothing can see them; `refresh_prototypes` is there for them."""
    source = dict(routed(others, top_k=1).named_parameters())
    for name, parameter in used.named_parameters():
        if "arrow_lora_A" in name or "arrow_lora_B" in name:
            parameter.data.copy_(source[name].data)
    used.refresh_prototypes()
    assert torch.equal(logits(used), other[1])


def test_hotswap_is_refused(used, other):
    before = logits(used)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA"):
        hotswap_adapter(used, other[0], "default")
    assert torch.equal(logits(used), before)


def test_expert_trained_alone_and_put_back(tmp_path, trio):
    """Train one expert as a plain adapter, replace it: the router sees the new one at once."""
    model = routed(dict(trio), top_k=1)
    logits(model)
    model.remove_expert("two")
    model.add_expert(adapter(tmp_path / "two", seed=31, r=4))
    assert model.expert_names == ["one", "three", "two"]
    folders = [trio["one"], trio["three"], str(tmp_path / "two")]
    assert torch.equal(logits(model), logits(routed(folders, top_k=1)))
    assert_layers_match(model, folders, top_k=1)


def test_load_over_an_existing_name_with_another_alpha(tmp_path, trio, used):
    """The file's scaling is used, not the one that was there."""
    folders = [adapter(tmp_path / str(seed), seed=seed, r=4, lora_alpha=64) for seed in (1, 2, 3)]
    louder = routed(folders, top_k=1)
    louder.save_pretrained(tmp_path / "louder")
    used.load_adapter(str(tmp_path / "louder"), "default")
    assert torch.equal(logits(used), logits(louder))


def test_load_over_an_existing_name_with_other_ranks(tmp_path):
    """Ranks 2 + 6 over 6 + 2: every shape agrees, and nothing else does."""
    six = [adapter(tmp_path / f"a{rank}", seed=rank, r=rank) for rank in (6, 2)]
    two = [adapter(tmp_path / f"b{rank}", seed=rank + 10, r=rank) for rank in (2, 6)]
    wanted = routed(two, top_k=1)
    wanted.save_pretrained(tmp_path / "two")
    model = routed(six, top_k=1)
    model.load_adapter(str(tmp_path / "two"), "default")
    assert torch.equal(logits(model), logits(wanted))


def test_dtype_there_and_back(trio):
    """The factors are rounded on the way; the prototypes are those of what is there."""
    model = routed(list(trio.values()), top_k=1)
    logits(model)
    model.to(torch.bfloat16).to(torch.float32)
    found = logits(model)
    model.refresh_prototypes()
    assert difference(logits(model), found) == 0
