"""X-LoRA of PEFT: another method, timed and not compared."""

from __future__ import annotations

import warnings

import torch
from peft import PeftModel, XLoraConfig, get_peft_model
from torch import nn

from .bases import sharing_copy


def xlora_model(base: nn.Module, folders: list[str], top_k: int) -> PeftModel:
    """X-LoRA over the adapters, with an untrained classifier of one layer; it runs the base once more to choose."""
    copy = sharing_copy(base)
    copy.config.use_cache = False
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=copy.config.hidden_size,
        adapters={str(i): folder for i, folder in enumerate(folders)},
        top_k_lora=top_k,
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's notes about its own placeholder configuration
        torch.manual_seed(0)
        return get_peft_model(copy, config, autocast_adapter_dtype=False).eval()
