"""A.5: one expert equals the plain adapter on every architecture, two are the formula, heads are the trained ones."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from peft_arrow import ArrowLoraModel

from . import bases
from .adapters import (
    TOLERANCE,
    VISIBLE,
    adapter,
    assert_layers_match,
    assert_one_expert_is_plain,
    difference,
    logits,
    plain,
    routed,
)


ARCHITECTURES = {
    "gpt2": (bases.gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "t5": (bases.t5, {"target_modules": ["q", "v", "wi", "wo"], "task_type": "SEQ_2_SEQ_LM"}),
    "opt": (bases.opt, {"target_modules": ["q_proj", "v_proj", "fc1"]}),
    "vit": (bases.vit_classifier, {"target_modules": ["q_proj", "v_proj", "query", "value"], "task_type": None}),
    "segformer": (bases.segformer, {"target_modules": r".*(query|value|q_proj|v_proj)", "task_type": None}),
    "swin": (bases.swin_classifier, {"target_modules": r".*(query|value|q_proj|v_proj)", "task_type": None}),
    "whisper": (bases.whisper, {"target_modules": ["q_proj", "v_proj"], "task_type": None}),
    "mixtral": (bases.mixtral, {"target_modules": ["q_proj", "v_proj"]}),
    "bert": (bases.bert_classifier, {"target_modules": ["query", "value"], "task_type": None}),
    "clip": (bases.clip, {"target_modules": ["q_proj", "v_proj"], "task_type": None}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_expert(tmp_path, name):
    make_base, options = ARCHITECTURES[name]
    assert_one_expert_is_plain(adapter(tmp_path / "one", make_base, **options), make_base)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_experts(tmp_path, name):
    make_base, options = ARCHITECTURES[name]
    folders = [adapter(tmp_path / str(rank), make_base, seed=rank, r=rank, **options) for rank in (2, 4)]
    model = routed(folders, make_base, top_k=2)
    assert_layers_match(model, folders, make_base, top_k=2)
    before = logits(model, **bases.inputs_of(make_base))
    model.save_pretrained(tmp_path / "routed")
    again = PeftModel.from_pretrained(make_base(), tmp_path / "routed")
    assert torch.equal(logits(again, **bases.inputs_of(make_base)), before)


HEADS = {
    "llama": (bases.llama_classifier, {"target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_CLS"}),
    "bert": (bases.bert_classifier, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "vit": (
        bases.vit_classifier,
        {"target_modules": ["q_proj", "query"], "task_type": None, "modules_to_save": ["classifier"]},
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_trained_head_of_one_expert(tmp_path, name):
    make_base, options = HEADS[name]
    assert_one_expert_is_plain(adapter(tmp_path / "one", make_base, **options), make_base)


@pytest.mark.parametrize("name", HEADS)
def test_trained_heads_of_two_experts(tmp_path, name):
    """One head can be in place: which, is the user's choice, and it is what is saved."""
    make_base, options = HEADS[name]
    heads = {key: adapter(tmp_path / key, make_base, seed=s, **options) for s, key in enumerate("ab", 1)}
    inputs = bases.inputs_of(make_base)
    with pytest.raises(ValueError, match=r"'a' and 'b' bring different trained modules.*modules_to_save_from"):
        routed(heads, make_base)
    model = routed(heads, make_base, modules_to_save_from="b")
    found = logits(model, **inputs)
    alone = routed({"b": heads["b"]}, make_base)
    wanted = {key: value for key, value in alone.state_dict().items() if ".modules_to_save." in key}
    assert wanted and all(torch.equal(model.state_dict()[key], value) for key, value in wanted.items())
    assert difference(found, logits(routed(heads, make_base, modules_to_save_from="a"), **inputs)) > VISIBLE
    model.save_pretrained(tmp_path / "routed")
    again = PeftModel.from_pretrained(make_base(), tmp_path / "routed")
    assert torch.equal(logits(again, **inputs), found)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "q_proj"]])
def test_embedding_adapters_are_refused(tmp_path, targets):
    with pytest.raises(ValueError, match="embed_tokens.*not supported.*an embedding's input is a token id"):
        routed([adapter(tmp_path / "bad", target_modules=targets)])


def test_moe_parameters_are_refused(tmp_path):
    options = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    with pytest.raises(ValueError, match="target_parameters=.*not supported.*parameters inside MoE layers"):
        routed([adapter(tmp_path / "bad", bases.mixtral, **options)], bases.mixtral)


class Convolution(nn.Module):
    """A convolution and a linear module."""

    def __init__(self, kind):
        super().__init__()
        self.conv = kind(4, 4, 3, padding=1)
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        return self.linear(self.conv(x))


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_convolutions_are_refused_by_name(tmp_path, kind):
    """PEFT lists Conv1d as allowed and then dies of a variant table; here the error says what is supported."""
    config = LoraConfig(target_modules=["conv", "linear"], init_lora_weights=False)
    get_peft_model(Convolution(kind), config).save_pretrained(tmp_path / "bad")
    with pytest.raises(ValueError, match="'bad'.*conv.*only linear modules"):
        ArrowLoraModel.from_pretrained(Convolution(kind), [tmp_path / "bad"])


class OtherLinear(nn.Module):
    """Computes like a linear module without being one, as layers of quantisation libraries do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 8))

    def forward(self, x):
        return x @ self.weight.T


def test_unknown_linear_layers_are_refused_by_name(tmp_path):
    made = nn.Sequential(nn.Linear(8, 4))
    get_peft_model(made, LoraConfig(target_modules=["0"], init_lora_weights=False)).save_pretrained(tmp_path / "bad")
    with pytest.raises(ValueError, match="'bad'.*0 is a OtherLinear; supported are Linear, Conv1D"):
        ArrowLoraModel.from_pretrained(nn.Sequential(OtherLinear()), [tmp_path / "bad"])


QUANTISED = ("8bit", "4bit", "torchao int8", "torchao int8 dynamic", "torchao by hand")


def wide_llama():
    return bases.llama(hidden_size=64, intermediate_size=128)


@pytest.fixture
def quantised(tmp_path):
    """A function that makes the tiny Llama with its linear modules quantised, on this CPU."""
    wide_llama().save_pretrained(tmp_path / "base")
    torchao = pytest.importorskip("torchao.quantization")

    def make(kind: str):
        if kind == "torchao by hand":
            base = wide_llama()
            torchao.quantize_(base, torchao.Int8WeightOnlyConfig())
            return base
        config = {
            "8bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
            "4bit": lambda: BitsAndBytesConfig(load_in_4bit=True),
            "torchao int8": lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig()),
            "torchao int8 dynamic": lambda: TorchAoConfig(torchao.Int8DynamicActivationInt8WeightConfig()),
        }[kind]()
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=config, device_map="cpu"
        ).eval()

    return make


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.filterwarnings("default")  # the quantisation libraries' own
def test_quantised_bases(tmp_path, quantised, kind):
    one, two = (adapter(tmp_path / str(seed), wide_llama, seed=seed) for seed in (1, 2))
    expected = logits(PeftModel.from_pretrained(quantised(kind), one).eval())
    effect = difference(expected, logits(quantised(kind)))
    assert effect > VISIBLE
    found = logits(ArrowLoraModel.from_pretrained(quantised(kind), [one], top_k=1))
    # rounding inputs to 8 bits makes 0.2 of 2e-7, in plain PEFT too
    tolerance = 0.1 * effect if kind == "torchao int8 dynamic" else TOLERANCE
    assert difference(found, expected) <= tolerance
    model = ArrowLoraModel.from_pretrained(quantised(kind), {"one": one, "two": two}, top_k=1)
    with torch.no_grad():
        mixed = model(bases.token_ids(), adapter_names=["default", "one"]).logits
    # kernels with 8-bit activations round by batch: PEFT's own rows differ by 0.06 between two batches
    assert difference(mixed[1:], expected[1:]) <= 0.1 * effect
    assert difference(mixed[:1], logits(model)[:1]) <= 0.1 * effect


def test_fan_in_fan_out_needs_no_warning(tmp_path):
    """GPT-2's transposed weights are seen from the module: no flag, and (warnings being errors here) no warning."""
    folder = adapter(tmp_path / "one", bases.gpt2, target_modules=["c_attn"], fan_in_fan_out=True)
    inputs = bases.inputs_of(bases.gpt2)
    found = logits(routed([folder], bases.gpt2), **inputs)
    assert difference(found, logits(plain(folder, bases.gpt2), **inputs)) <= TOLERANCE
