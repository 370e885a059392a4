"""Quantised bases that run on a CPU: bitsandbytes 8 and 4 bit, torchao int8 weight-only.

The reference is plain PEFT LoRA on the same quantised base: with one expert the routed model is that adapter.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from peft import PeftModel
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from peft_arrow import ArrowLoraModel
from tests.pico import pico_adapter
from tests.training.helpers import changed, factors, logits, prototype_error, relative_difference, token_batch


def _torchao_config():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


METHODS = {
    "bitsandbytes 8 bit": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "bitsandbytes 4 bit": (
        "bitsandbytes",
        lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    ),
    "torchao int8": ("torchao", _torchao_config),
}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def wide_base() -> LlamaForCausalLM:
    """A Llama of two layers; bitsandbytes quantises blocks of 64 weights, so nothing may be narrower."""
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A saved base, and two adapters of different ranks for it."""
    root = tmp_path_factory.mktemp("quantised")
    wide_base().save_pretrained(root / "base")
    pico_adapter(root / "dates", seed=1, base=wide_base(), r=4, lora_alpha=16, target_modules=TARGETS)
    pico_adapter(root / "sql", seed=2, base=wide_base(), r=6, target_modules=TARGETS[:2])
    return {name: str(root / name) for name in ("base", "dates", "sql")}


@pytest.fixture(params=METHODS)
def quantised(request, folders):
    """Load the base anew, quantised."""
    package, make_config = METHODS[request.param]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return lambda: LlamaForCausalLM.from_pretrained(
        folders["base"], quantization_config=make_config(), device_map="cpu", dtype=torch.float32
    ).eval()


def test_the_base_is_quantised(quantised):
    base = quantised()
    weight = base.model.layers[0].self_attn.q_proj.weight
    assert type(weight) is not torch.nn.Parameter
    difference = relative_difference(logits(base), logits(wide_base()))
    assert 1e-5 < difference < 0.5, "rounded, and still the same model"


@pytest.mark.parametrize("kernel", ["eager", "folded"])
def test_one_expert_equals_plain_lora(kernel, quantised, folders):
    plain = PeftModel.from_pretrained(quantised(), folders["dates"]).eval()
    routed = ArrowLoraModel.from_pretrained(quantised(), {"dates": folders["dates"]}, top_k=1)
    routed.base_model.set_kernel(kernel)
    expected = logits(plain)
    assert relative_difference(logits(routed), expected) < 1e-5
    assert relative_difference(logits(quantised()), expected) > 1e-2, "the adapter has an effect"


def test_two_experts_and_disable_adapter(quantised, folders):
    adapters = {name: folders[name] for name in ("dates", "sql")}
    routed = ArrowLoraModel.from_pretrained(quantised(), adapters, top_k=1)
    bare = logits(quantised())
    both = logits(routed)
    assert prototype_error(routed) < 1e-5
    assert relative_difference(both, bare) > 1e-2
    with routed.disable_adapter():
        assert torch.equal(logits(routed), bare)
    assert torch.equal(logits(routed), both)


def test_gradients_flow_to_the_experts_as_to_plain_lora(quantised, folders):
    routed = ArrowLoraModel.from_pretrained(quantised(), {"dates": folders["dates"]}, top_k=1, is_trainable=True)
    plain = PeftModel.from_pretrained(quantised(), folders["dates"], is_trainable=True)
    found = {}
    for model, mark in ((routed, ".arrow_lora_"), (plain, ".lora_")):
        model.train()
        model(**token_batch()).loss.backward()
        found[mark] = {
            name.replace(mark, "."): parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
    expected, gradients = found[".lora_"], found[".arrow_lora_"]
    assert gradients.keys() == expected.keys() and len(expected) == 2 * 2 * len(TARGETS)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        assert (gradients[name] - gradient).abs().max() < 1e-5 * max(gradient.abs().max().item(), 1e-3), name


def test_training_a_subset_then_saving_and_loading(quantised, folders, tmp_path):
    adapters = {name: folders[name] for name in ("dates", "sql")}
    model = ArrowLoraModel.from_pretrained(
        quantised(), adapters, top_k=1, is_trainable=True, trainable_experts=["dates"]
    ).train()
    before = factors(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(2):
        model(**token_batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moves = changed(before, factors(model))
    assert moves["all"] == {"dates"} and moves["none"] == {"sql"}

    expected = logits(model)
    assert prototype_error(model) < 1e-5
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantised(), tmp_path, adapter_name="again")
    assert changed(before, factors(again, "again"))["all"] == {"dates"}
    assert relative_difference(logits(again), expected) < 1e-5  # one bank adds in another order than two
    twice = PeftModel.from_pretrained(quantised(), tmp_path)
    assert torch.equal(logits(again), logits(twice))
