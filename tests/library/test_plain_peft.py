"""What is shared loads with plain PEFT in an environment where peft-arrow is not installed, and suits vLLM's rules."""

from __future__ import annotations

import json
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_arrow import AdapterLibrary, ArrowLoraModel
from peft_arrow.library.serving import vllm_notes
from tests.pico import pico_base


LOAD = """
import importlib.util, sys, torch
spec = importlib.util.find_spec("peft_arrow")  # an editable install leaves a folder with the cards, without code
assert spec is None or spec.origin is None, "peft-arrow is installed here"
from peft import PeftModel
from transformers import LlamaForCausalLM
base, out, *folders = sys.argv[1:]
logits = []
for folder in folders:
    folder, _, subfolder = folder.partition("::")
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder, subfolder=subfolder or None)
    with torch.no_grad():
        logits.append(model(torch.arange(12).reshape(2, 6) + 5).logits)
torch.save(logits, out)
"""


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """The interpreter of an environment with PEFT and transformers, through a path file, and without peft-arrow."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    site_packages = next(folder.glob("lib/python*/site-packages"))
    # path files inside the parent are not read this way, so an editable peft_arrow stays out of sight
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def load_bare(python: Path, folder: Path, *references: str) -> list[torch.Tensor]:
    """Logits of each adapter in the bare environment."""
    pico_base().save_pretrained(folder / "base")
    run = [str(python), "-I", "-c", LOAD, str(folder / "base"), str(folder / "out.pt"), *references]
    answer = subprocess.run(run, capture_output=True, text=True, cwd=folder, timeout=300)
    assert answer.returncode == 0, answer.stderr
    return torch.load(folder / "out.pt")


def notes_of(folder: Path) -> list[str]:
    """What vLLM's rules say against a LoRA folder."""
    shapes = {key: tuple(value.shape) for key, value in load_file(folder / "adapter_model.safetensors").items()}
    return vllm_notes(json.loads((folder / "adapter_config.json").read_text()), shapes)


def test_experts_of_a_library(adapter_folders, tmp_path, bare_python):
    library = AdapterLibrary.from_pretrained(list(adapter_folders.values()), base_model="me/pico")
    library.save_pretrained(tmp_path / "lib")
    found = load_bare(bare_python, tmp_path, *(f"{tmp_path / 'lib'}::experts/{name}" for name in library))
    routed = ArrowLoraModel.from_pretrained(pico_base(), tmp_path / "lib")
    for name, logits in zip(library, found, strict=True):
        with torch.no_grad():
            pinned = routed(torch.arange(12).reshape(2, 6) + 5, adapter_names=[name] * 2).logits
        torch.testing.assert_close(pinned, logits, atol=1e-5, rtol=0)
        assert notes_of(tmp_path / "lib/experts" / name) == []


@pytest.mark.parametrize("method", ["svd", "cat"])
def test_exports(adapter_folders, tmp_path, bare_python, method):
    """One expert alone, exported, is that adapter; a mean of different ranks and modules has one rank for all."""
    routed = ArrowLoraModel.from_pretrained(pico_base(), adapter_folders)
    routed.export_lora(tmp_path / "alone", weights={"dates": 1.0}, method=method)
    routed.export_lora(tmp_path / "mean", method=method)
    alone, _ = load_bare(bare_python, tmp_path, str(tmp_path / "alone"), str(tmp_path / "mean"))
    with torch.no_grad():
        pinned = routed(torch.arange(12).reshape(2, 6) + 5, adapter_names=["dates"] * 2).logits
    torch.testing.assert_close(pinned, alone, atol=1e-5, rtol=0)
    assert notes_of(tmp_path / "mean") == []
