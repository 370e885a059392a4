"""A.1: what is saved comes back, by every route, bit for bit."""

from __future__ import annotations

import copy
import io
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from peft.tuners.lora import ArrowConfig, create_arrow_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from .adapters import VISIBLE, adapter, difference, expert_files, logits, routed
from .bases import WIDTH, llama


@pytest.fixture
def saved(tmp_path):
    """A saved routed model whose adapters are gone, and the logits it had."""
    folders = [adapter(tmp_path / name, seed=seed, r=4) for seed, name in enumerate(("one", "two"), 1)]
    llama().save_pretrained(tmp_path / "base")
    model = routed(
        folders,
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval(),
        top_k=1,
        router_temperature=0.5,
    )
    before = logits(model)
    assert difference(before, logits(llama())) > VISIBLE
    model.save_pretrained(tmp_path / "routed")
    for folder in folders:
        shutil.rmtree(folder)
    torch.manual_seed(99)
    return str(tmp_path / "routed"), before


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_peft_model_loads_the_folder(saved, low_cpu_mem_usage):
    folder, before = saved
    again = PeftModel.from_pretrained(llama(), folder, adapter_name="again", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(again), before)
    assert again.expert_names == ["one", "two"]
    config = again.peft_config["again"]
    assert (config.router, config.top_k, config.router_temperature) == ("arrow", 1, 0.5)


def test_auto_peft_model_loads_the_folder(saved):
    folder, before = saved
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder)), before)


def test_transformers_loads_the_folder(saved):
    folder, before = saved
    base = llama()
    base.load_adapter(folder)
    assert torch.equal(logits(base), before)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), before)


def test_load_adapter_beside_another_library(saved, trio):
    folder, before = saved
    model = routed([trio["three"]])
    other = logits(model)
    model.load_adapter(folder, "second")
    assert torch.equal(logits(model), other), "loading alone must not change what is active"
    model.set_adapter("second")
    assert torch.equal(logits(model), before) and model.expert_names == ["one", "two"]


def test_folder_of_create_arrow_model(tmp_path, trio):
    """The folder that PEFT writes and cannot read: its experts, in their order, are routed here."""
    peers = create_arrow_model(llama(), list(trio.values()), ArrowConfig(top_k=2, rng_seed=3))
    peers.save_pretrained(str(tmp_path / "peers"))
    model = routed(str(tmp_path / "peers"), top_k=2)
    assert model.expert_names == ["task_0", "task_1", "task_2"]
    assert torch.equal(logits(model), logits(routed(list(trio.values()), top_k=2)))


@pytest.mark.parametrize("seeds", [(3, 3), (3, 4)], ids=["same seed", "another seed"])
def test_rebuilding_from_the_same_files(trio, seeds):
    answers = []
    for seed in seeds:
        torch.manual_seed(seed)
        answers.append(logits(routed(list(trio.values()), top_k=2)))
    assert torch.equal(*answers)


def test_state_dict_into_another_model(tmp_path, trio):
    """Prototypes travel in the state dict: a resumed model routes as the saved one did."""
    model = routed(list(trio.values()), top_k=1)
    before = logits(model)
    others = [adapter(tmp_path / str(seed), seed=seed, r=4) for seed in (7, 8, 9)]
    other = routed(others, top_k=1)
    assert difference(logits(other), before) > VISIBLE
    answer = other.load_state_dict(model.state_dict())
    assert not answer.missing_keys and not answer.unexpected_keys
    assert torch.equal(logits(other), before)


def test_the_file_holds_experts_and_prototypes_only(saved):
    tensors = load_file(Path(saved[0]) / "adapter_model.safetensors")
    outs = {"q_proj": WIDTH, "v_proj": WIDTH // 2}
    # two experts of rank 4 in two layers: factors, and one prototype an expert
    expected = sum(2 * (2 * 4 * (WIDTH + out) + 2 * WIDTH) for out in outs.values())
    assert sum(tensor.numel() for tensor in tensors.values()) == expected
    config, _ = expert_files(saved[0])
    assert config["peft_type"] == "ARROW_LORA" and config["expert_names"] == ["one", "two"]


def test_copies_and_pickles(trio):
    model = routed(list(trio.values()), top_k=2)
    before = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), before)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(logits(torch.load(buffer, weights_only=False)), before)
