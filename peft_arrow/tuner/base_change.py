"""Adapters whose initialisation took something out of the base weights: PiSSA and OLoRA.

Such an adapter was trained on W - s B0 A0, where B0 A0 follows from W alone, and its files hold B and A. On the
unchanged base W the same function is the plain update s (B A - B0 A0), a LoRA of twice the rank.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from ..library.adapter import Adapter
from ..library.lora import Factors, LoraContent
from ..library.lora_config import KEPT_BASE_CHANGING_INITS


def undo_base_change(
    adapter: Adapter, content: LoraContent, modules: dict[str, nn.Module], cache: dict[tuple, tuple]
) -> LoraContent:
    """The content as plain updates of the unchanged base; other adapters are returned as they are.

    Args:
        adapter (`Adapter`), content (`LoraContent`): the adapter and its tensors.
        modules (`dict[str, nn.Module]`): the base's linear modules by name.
        cache (`dict`): keeps what was computed from the base between adapters.
    """
    init = adapter.config.get("init_lora_weights")
    if init not in KEPT_BASE_CHANGING_INITS:
        return content
    factors = {}
    for name, factor in content.factors.items():
        key = (name, init, factor.lora_A.shape[0], factor.scaling)
        if key not in cache:
            cache[key] = _initial_factors(modules[name], *key[1:])
        lora_A, lora_B = cache[key]
        factors[name] = Factors(
            torch.cat([factor.lora_A, lora_A.to(factor.lora_A)]),
            torch.cat([factor.lora_B, -lora_B.to(factor.lora_B)], dim=1),
            factor.scaling,
        )
    return dataclasses.replace(content, factors=factors)


def _initial_factors(module: nn.Module, init: str, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A0 and B0 as PEFT itself makes them from the module's weight."""
    box = nn.Sequential()
    box.add_module("linear", copy.deepcopy(module))
    config = LoraConfig(r=rank, lora_alpha=scaling * rank, target_modules=["linear"], init_lora_weights=init)
    layer = get_peft_model(box, config).base_model.model.linear
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
