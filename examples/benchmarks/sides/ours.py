"""Our side: a routed model of the experts, and its kernels."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_arrow import ArrowLoraConfig
from peft_arrow.ops import KERNELS

from .bases import linear_modules, sharing_copy
from .experts import Experts, target_modules, task_type


ADAPTER = "default"


@torch.no_grad()
def routed_model(base: nn.Module, experts: Experts, top_k: int, trainable: bool = False) -> PeftModel:
    """The base, routed by Arrow between the experts, with its prototypes built.

    The factors are written into fresh experts, so that not even a thousand are in memory twice.
    """
    config = ArrowLoraConfig(
        num_experts=experts.count,
        r=experts.rank,
        lora_alpha=experts.scaling * experts.rank,
        target_modules=target_modules(base),
        task_type=task_type(base),
        top_k=top_k,
        inference_mode=not trainable,
    )
    model = get_peft_model(sharing_copy(base), config, autocast_adapter_dtype=False)
    modules = linear_modules(base)
    for name, layer in routed_layers(model).items():
        made = zip(*experts.factors(name, modules[name]), strict=True)
        for (lora_A, lora_B), (value_A, value_B) in zip(layer.expert_factors(ADAPTER), made, strict=True):
            lora_A.copy_(value_A)
            lora_B.copy_(value_B)
    model.build_prototypes()
    return model.train(trainable)


def routed_layers(model: PeftModel) -> dict[str, nn.Module]:
    """The routed layers by the base's own module names."""
    return model.base_model.routed_layers()


def prototypes(layer: nn.Module) -> torch.Tensor:
    """The prototypes of a routed layer, float32 (E, I)."""
    return layer.arrow_lora_router[ADAPTER].weight.detach()


def kernels(device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The kernels to time, `auto` first, and those that cannot run on this device with the reason."""
    absent = {"triton": "needs CUDA"} if device.type != "cuda" and "triton" in KERNELS else {}
    return ["auto", *(name for name in KERNELS if name not in absent)], absent
