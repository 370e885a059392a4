"""Save and load: every way back gives the same bits, in a new process, under another name, without the adapters."""

from __future__ import annotations

import copy
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_arrow import ArrowLoraConfig, ArrowLoraModel
from tests.pico import pico_adapter, pico_base


GOLDEN = Path(__file__).parent.parent / "golden"

RELOAD = """
import sys, torch, peft_arrow
from peft import PeftModel
from transformers import LlamaForCausalLM
torch.manual_seed(12345)
base, folder, out = sys.argv[1:]
model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder, adapter_name="another")
ids = torch.arange(12).reshape(2, 6) + 5
with torch.no_grad():
    torch.save(model(ids).logits, out)
"""


@pytest.fixture
def ids():
    """Two rows of six tokens."""
    return torch.arange(12).reshape(2, 6) + 5


@pytest.fixture
def routed(adapter_folders):
    """Three experts of different ranks and modules."""
    return ArrowLoraModel.from_pretrained(pico_base(), adapter_folders, top_k=2)


def logits_of(model, ids):
    """Logits without gradients."""
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("built_before", [True, False])
def test_new_process_other_name_other_seed_adapters_deleted(tmp_path, ids, built_before):
    """The saved folder is all that is needed; the logits are equal bit for bit."""
    folders = [
        pico_adapter(tmp_path / f"a{i}", seed=i, r=2 + i, target_modules=["q_proj", "v_proj"]) for i in range(3)
    ]
    pico_base().save_pretrained(tmp_path / "base")
    model = ArrowLoraModel.from_pretrained(pico_base(), folders, top_k=2)
    if built_before:
        expected = logits_of(model, ids)
    model.save_pretrained(tmp_path / "routed")
    expected = logits_of(model, ids)
    for folder in folders:
        shutil.rmtree(folder)
    out = tmp_path / "logits.pt"
    arguments = [str(tmp_path / "base"), str(tmp_path / "routed"), str(out)]
    subprocess.run([sys.executable, "-c", RELOAD, *arguments], check=True, cwd=Path(__file__).parents[2])
    assert torch.equal(torch.load(out), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_every_way_to_load_it_back(tmp_path, routed, ids, low_cpu_mem_usage):
    """PeftModel, AutoPeftModel, transformers' load_adapter and from_pretrained of the folder."""
    expected = logits_of(routed, ids)
    pico_base().save_pretrained(tmp_path / "base")
    routed.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    folder = str(tmp_path / "routed")
    routed.save_pretrained(folder)
    native = pico_base()
    native.load_adapter(folder, adapter_name="mine", low_cpu_mem_usage=low_cpu_mem_usage)
    models = [
        PeftModel.from_pretrained(pico_base(), folder, low_cpu_mem_usage=low_cpu_mem_usage),
        AutoPeftModelForCausalLM.from_pretrained(folder, low_cpu_mem_usage=low_cpu_mem_usage),
        AutoModelForCausalLM.from_pretrained(folder),
        native,
    ]
    for model in models:
        assert torch.equal(logits_of(model, ids), expected)


def test_state_dict_copy_and_pickle(routed, ids):
    """torch.save of the model, deepcopy, and state_dict into a model built another way."""
    expected = logits_of(routed, ids)
    assert torch.equal(logits_of(copy.deepcopy(routed), ids), expected)
    file = io.BytesIO()
    torch.save(routed, file)
    file.seek(0)
    assert torch.equal(logits_of(torch.load(file, weights_only=False), ids), expected)


def test_disk_format_has_one_stack_a_layer(tmp_path, adapter_folders, ids):
    """Two banks in memory, one stack on disk; a subset's reload adds in another order and differs by rounding."""
    model = ArrowLoraModel.from_pretrained(
        pico_base(), adapter_folders, is_trainable=True, trainable_experts=["sql"], top_k=2
    ).eval()
    expected = logits_of(model, ids)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    assert {key for key in tensors if key.startswith(prefix)} == {
        f"{prefix}.arrow_lora_{part}.weight" for part in ("A", "B", "router")
    }
    assert tensors[f"{prefix}.arrow_lora_A.weight"].shape == (4 + 8 + 2, 32)
    assert tensors[f"{prefix}.arrow_lora_router.weight"].shape == (3, 32)
    assert torch.isfinite(tensors[f"{prefix}.arrow_lora_router.weight"]).all()
    assert float((logits_of(PeftModel.from_pretrained(pico_base(), tmp_path), ids) - expected).abs().max()) < 1e-6
    trainable = PeftModel.from_pretrained(pico_base(), tmp_path, is_trainable=True).eval()
    assert torch.equal(logits_of(trainable, ids), expected)


def test_settings_come_back(tmp_path, routed, ids):
    """Router, top_k, temperature and names are in the config; `adapters` is not."""
    routed.set_router("uniform", top_k=1, router_temperature=0.5)
    expected = logits_of(routed, ids)
    routed.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "adapters" not in written and written["peft_type"] == "ARROW_LORA" and written["format_version"] == 2
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(config, ArrowLoraConfig)
    assert (config.router, config.top_k, config.router_temperature) == ("uniform", 1, 0.5)
    loaded = PeftModel.from_pretrained(pico_base(), tmp_path)
    assert loaded.expert_names == routed.expert_names
    assert torch.equal(logits_of(loaded, ids), expected)


def test_fresh_experts_round_trip(tmp_path, ids):
    """Experts that were never adapters."""
    config = ArrowLoraConfig(
        num_experts=3, r=4, target_modules=["q_proj", "v_proj"], init_weights=False, task_type="CAUSAL_LM", top_k=2
    )
    model = get_peft_model(pico_base(), config).eval()
    expected = logits_of(model, ids)
    assert float((expected - logits_of(pico_base(), ids)).abs().max()) > 1e-3
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    assert torch.equal(logits_of(PeftModel.from_pretrained(pico_base(), tmp_path, adapter_name="x"), ids), expected)


def test_two_libraries_in_one_model(tmp_path, routed, adapter_folders, ids):
    """A second routed adapter beside the first: own experts, own settings, saved in its own folder."""
    expected = logits_of(routed, ids)
    routed.add_adapter("second", ArrowLoraConfig(adapters=[adapter_folders["sql"]], top_k=1, task_type="CAUSAL_LM"))
    assert torch.equal(logits_of(routed, ids), expected)
    routed.set_adapter("second")
    assert routed.expert_names == ["sql"]
    plain = PeftModel.from_pretrained(pico_base(), adapter_folders["sql"])
    assert float((logits_of(routed, ids) - logits_of(plain, ids)).abs().max()) < 1e-5
    routed.save_pretrained(tmp_path)
    assert (tmp_path / "second" / "adapter_config.json").is_file()
    routed.set_adapter("default")
    routed.delete_adapter("second")
    assert torch.equal(logits_of(routed, ids), expected)


def test_golden_checkpoint_of_format_1(ids):
    """A folder written by format version 1 loads, with the logits it had then."""
    model = PeftModel.from_pretrained(pico_base(), GOLDEN / "format-1")
    expected = load_file(GOLDEN / "format-1" / "expected.safetensors")["logits"]
    assert model.expert_names == ["plurals", "dates", "sql"]
    assert float((logits_of(model, ids) - expected).abs().max()) < 1e-5


def test_golden_checkpoint_of_format_2(ids):
    """With options, calibration, and what two routers learnt: the logits that it had when it was written."""
    model = PeftModel.from_pretrained(pico_base(), GOLDEN / "format-2").eval()
    expected = load_file(GOLDEN / "format-2" / "expected.safetensors")
    assert model.active_peft_config.router == "spectr" and model.active_peft_config.calibrated
    assert float((logits_of(model, ids) - expected["spectr"]).abs().max()) < 1e-5
    model.set_router("centroid", calibrated=False, top_p=None, null_expert=None, masked_experts=None, tied=False)
    assert float((logits_of(model, ids) - expected["centroid"]).abs().max()) < 1e-5
    model.set_router("task_predictor", granularity="sequence")
    assert float((logits_of(model, ids) - expected["task_predictor"]).abs().max()) < 1e-5


def test_newer_format_is_refused(tmp_path, routed):
    """A format that this version does not know is named, with what to do."""
    routed.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 3'))
    with pytest.raises(ValueError, match="format_version=3 is newer than 2"):
        PeftModel.from_pretrained(pico_base(), tmp_path)
