"""A pico base, a small library and rows: what the tests of `adapt` share."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from peft_arrow import AdapterLibrary
from tests.pico import pico_adapter, pico_base, pico_tokenizer


ROWS = [{"prompt": f"{letter}:", "completion": f" {letter * 3}"} for letter in "abcdefgh"]
TARGETS = ["q_proj", "v_proj"]
SFT = {
    "learning_rate": 0.01,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_grad_norm": 1.0,
    "max_length": 32,
    "save_steps": 2,
}
KEY = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"


def base_in(folder: Path) -> Path:
    """A pico base with its tokenizer, saved."""
    target = folder / "base"
    if not target.exists():
        pico_base().save_pretrained(target)
        pico_tokenizer().save_pretrained(target)
    return target


def library_in(folder: Path, count: int = 3, **lora) -> AdapterLibrary:
    """Experts with random A and B, of one rank unless `lora` gives each its own config."""
    base = pico_base()
    base.config._name_or_path = str(base_in(folder))
    config = {"r": 2, "lora_alpha": 8, "target_modules": TARGETS, **lora}
    refs = {
        f"e{seed}": pico_adapter(folder / f"e{seed}", seed=seed, base=pico_named(folder), **config)
        for seed in range(count)
    }
    return AdapterLibrary.from_pretrained(refs)


def pico_named(folder: Path):
    """The pico base under the name of its folder."""
    base = pico_base()
    base.config._name_or_path = base.name_or_path = str(base_in(folder))
    return base


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def config_of(folder: Path) -> dict:
    return json.loads((Path(folder) / "adapter_config.json").read_text())
