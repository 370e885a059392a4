"""Names of base models that mean the same, and shapes from a model, from a config, and from what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from peft_arrow.library.base_shapes import BaseShapes, is_local_path, is_same_base, normalise_base
from tests.pico import pico_base


SHA = "0" * 40
LLAMA = "meta-llama/Llama-2-7b-hf"


@pytest.mark.parametrize(
    "name, normal",
    [
        (LLAMA, LLAMA),
        (f"/root/.cache/huggingface/hub/models--meta-llama--Llama-2-7b-hf/snapshots/{SHA}", LLAMA),
        (f"C:\\cache\\models--meta-llama--Llama-2-7b-hf\\snapshots\\{SHA}", LLAMA),
        ("https://huggingface.co/meta-llama/Llama-2-7b-hf/", LLAMA),
        ("/data/models/Llama-2-7b-hf/", "Llama-2-7b-hf"),
        ("../Llama-2-7b-hf", "Llama-2-7b-hf"),
        ("D:\\models\\Llama-2-7b-hf", "Llama-2-7b-hf"),
        ("gpt2", "gpt2"),
        ("", None),
        ("  ", None),
        ("/", None),
        ("..", None),
        (None, None),
        (7, None),
    ],
)
def test_what_a_name_stands_for(name, normal):
    """Folders of other machines are seen through."""
    assert normalise_base(name) == normal


@pytest.mark.parametrize(
    "one, other",
    [
        (LLAMA, "meta-llama/llama-2-7B-hf"),
        (LLAMA, "/data/Llama-2-7b-hf"),
        (LLAMA, "unsloth/llama-2-7b-bnb-4bit"),
        (LLAMA, "TheBloke/Llama-2-7B-GPTQ"),
        (LLAMA, "NousResearch/Llama-2-7b-hf"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "unsloth/Meta-Llama-3.1-8B-Instruct-unsloth-bnb-4bit"),
        ("meta-llama/Llama-3.1-8B-Instruct", "unsloth/Meta-Llama-3.1-8B-Instruct"),
        ("Qwen/Qwen2-7B-Instruct", "Qwen/Qwen2-7B-Instruct-GPTQ-Int4"),
        ("Qwen/Qwen2-7B-Instruct", "Qwen/Qwen2-7B-Instruct-AWQ"),
        ("Qwen/Qwen2-7B-Instruct", "Qwen/Qwen2-7B-Instruct-GGUF"),
        ("google/gemma-2-2b", "RedHatAI/gemma-2-2b-quantized.w4a16"),
        ("gpt2", "openai-community/gpt2"),
    ],
)
def test_names_of_one_model(one, other):
    """Case, mirrors, quantised copies, folders, ids without organisation; in both directions."""
    assert is_same_base(one, other) and is_same_base(other, one)


@pytest.mark.parametrize(
    "one, other",
    [
        (LLAMA, "meta-llama/Llama-2-7b-chat-hf"),
        (LLAMA, "meta-llama/Llama-2-13b-hf"),
        (LLAMA, "ann/Llama-2-7b-hf"),
        ("Qwen/Qwen2-7B", "Qwen/Qwen2-7B-Instruct"),
        ("gpt2", "openai-community/gpt2-medium"),
        (LLAMA, None),
        (None, None),
    ],
)
def test_names_of_two_models(one, other):
    """A fine-tune, another size, somebody's own copy, nothing."""
    assert not is_same_base(one, other)


def test_local_paths():
    """Paths of any system; ids and legacy ids are none."""
    assert all(map(is_local_path, ("/a/b", "./a", "../a", "~/a", "a/b/c", "C:\\a", "C:/a", "a\\b")))
    assert not any(map(is_local_path, ("gpt2", "a/b", "https://huggingface.co/a/b")))


def test_of_a_model_and_of_its_config(tmp_path):
    """The same shapes, without the weights: they are not even there."""
    base = pico_base()
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base/model.safetensors").unlink()
    loaded, read = BaseShapes.of(base), BaseShapes.of(tmp_path / "base").for_task("CAUSAL_LM")
    assert loaded.modules == read.modules and len(read.modules) == 15
    assert read.features("model.layers.1.mlp.down_proj") == (64, 32)
    assert read.kind("model.embed_tokens") == "Embedding" and read.features("model.embed_tokens") is None
    assert read.kind("model.layers.9") is None
    assert loaded.is_loaded and not read.is_loaded and read.parameter("lm_head.weight").is_meta
    assert BaseShapes.of(read) is read and loaded.for_task("SEQ_CLS") is loaded


def test_tasks(tmp_path):
    """Each task's class has its own module names and head."""
    pico_base().config.save_pretrained(tmp_path)
    shapes = BaseShapes.of(str(tmp_path))
    assert "layers.0.self_attn.q_proj" in shapes.for_task("FEATURE_EXTRACTION").modules
    assert "score" in shapes.for_task("SEQ_CLS").modules
    assert shapes.for_task(None).modules == shapes.for_task("CAUSAL_LM").modules
    unknown = shapes.for_task("SEQ_2_SEQ_LM")
    assert not unknown.is_known and "AutoModelForSeq2SeqLM cannot be made of its config" in unknown.reason


def test_conv1d_and_peft_models():
    """GPT-2 has transposed weights; a PEFT model is its base."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=8))
    features = BaseShapes.of(model).features("transformer.h.0.attn.c_attn")
    assert features == (16, 48)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    assert BaseShapes.of(wrapped).features("transformer.h.0.attn.c_attn") == (16, 48)
    assert not any("lora" in name for name in BaseShapes.of(wrapped).modules)


def test_stacked_layers():
    """`layer_replication` repeats layers; nonsense is an error of ours."""
    shapes = BaseShapes.of(pico_base())
    stacked = shapes.replicated([[0, 2], [1, 2]])
    assert "model.layers.2.self_attn.q_proj" in stacked.modules and stacked.is_loaded
    assert shapes.replicated([[0, 2], [1, 2]]) is stacked
    for bad in ([["a", 2]], [5], 7):
        with pytest.raises(ValueError, match="does not fit the base"):
            shapes.replicated(bad)


def test_targets_are_those_of_peft():
    """By name, by pattern, by the architecture's default, all linear ones."""
    shapes = BaseShapes.of(pico_base())
    model = get_peft_model(pico_base(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    adapted = {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert shapes.targets({"target_modules": "all-linear", "task_type": "CAUSAL_LM"}) == adapted
    assert len(shapes.targets({"target_modules": ["q_proj"], "layers_to_transform": [1]})) == 1
    assert len(shapes.targets({"target_modules": None})) == 4
    with pytest.raises(ValueError, match="layers_to_transform"):
        shapes.targets({"target_modules": "q_proj", "layers_to_transform": [1]})


CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize(
    "config",
    [
        "no json",
        "[]",
        json.dumps({"model_type": "made-up"}),
        json.dumps({"model_type": "made-up", "auto_map": {"AutoConfig": "code.Config"}}),
        json.dumps({**CONFIG, "hidden_size": "wide"}),
        json.dumps({**CONFIG, "num_hidden_layers": 10**9}),
        json.dumps({**CONFIG, "num_attention_heads": 0}),
        json.dumps({**CONFIG, "hidden_size": -5}),
        json.dumps({**CONFIG, "hidden_size": 10**30}),
    ],
)
def test_configs_that_say_nonsense(tmp_path, config):
    """Shapes unknown, with a reason; no code of a repository runs, nothing is raised."""
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "code.py").write_text("raise SystemExit('code of a stranger ran')")
    shapes = BaseShapes.of(str(tmp_path)).for_task("CAUSAL_LM")
    assert not shapes.is_known and shapes.reason and shapes.modules is None and shapes.name == str(tmp_path)


def test_what_cannot_be_had():
    """A missing folder, an id while offline; a wrong type is an argument's error."""
    for name in ("/does/not/exist", "nobody/nothing", Path("~/nowhere")):
        assert BaseShapes.of(name).reason
    with pytest.raises(TypeError, match="pass a model, a Hub id, a folder or None"):
        BaseShapes.of(7)


def test_weights_stay_unread(tmp_path, monkeypatch):
    """Of a folder nothing but the config is opened."""
    pico_base().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    monkeypatch.setattr(torch, "load", None)
    assert BaseShapes.of(tmp_path).for_task("CAUSAL_LM").is_known
