"""The modules of a base that an adapter goes on: its attention projections."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


def with_targets(config: Any, base: nn.Module) -> Any:
    """The config with the attention projections of this base as target modules, where it names none."""
    config = copy.deepcopy(config)
    if config.target_modules is None:
        config.target_modules = attention_modules(base) or "all-linear"
    return config


def attention_modules(base: nn.Module) -> list[str]:
    """The shortest name ends of the linear modules inside attention blocks, sorted; empty where there are none.

    q, k, v and output projections of Llama, Mistral and Qwen, `Wqkv` and `out_proj` of older Phi, `attn.c_proj` of
    GPT-2.
    """
    linear = [name.split(".") for name, module in base.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    inside = [parts for parts in linear if any("attn" in part or "attention" in part for part in parts[:-1])]
    outside = {parts[-1] for parts in linear if parts not in inside}
    return sorted({parts[-1] if parts[-1] not in outside else ".".join(parts[-2:]) for parts in inside})
