"""PEFT's own Arrow: `create_arrow_model`, with the same experts and prototypes as ours."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.arrow import create_arrow_model
from peft.tuners.lora.config import ArrowConfig
from torch import nn

from .bases import sharing_copy
from .ours import ADAPTER, prototypes, routed_layers


ROUTER = "arrow_router"


@torch.no_grad()
def peft_arrow_model(base: nn.Module, folder: str, ours: PeftModel, top_k: int, trainable: bool = False) -> PeftModel:
    """PEFT's routed model.

    `create_arrow_model` makes it of the first expert's folder. The others are put into each layer with the call that
    `load_adapter` makes there, because `load_adapter` takes quadratic time; PEFT's layers add what is put in to what
    they route between. Prototypes are ours, because PEFT's depend on a random start.

    Args:
        base (`nn.Module`): the base.
        folder (`str`): of the first expert.
        ours (`PeftModel`): the routed model whose experts and prototypes are copied.
        top_k (`int`): experts a token.
        trainable (`bool`): whether the experts train; PEFT's own entry point leaves them frozen.
    """
    config = ArrowConfig(top_k=top_k, rng_seed=0)
    model = create_arrow_model(sharing_copy(base), [folder], config, autocast_adapter_dtype=False)
    shape = model.peft_config["task_0"]
    options = LoraConfig(r=shape.r, lora_alpha=shape.lora_alpha, init_lora_weights=False, inference_mode=True)
    for name, layer in routed_layers(ours).items():
        theirs = model.get_base_model().get_submodule(name)
        for expert, (lora_A, lora_B) in enumerate(layer.expert_factors(ADAPTER)):
            if expert:
                theirs.update_layer(f"task_{expert}", shape.r, lora_alpha=shape.lora_alpha, config=options)
            theirs.lora_A[f"task_{expert}"].weight.copy_(lora_A)
            theirs.lora_B[f"task_{expert}"].weight.copy_(lora_B)
        theirs.lora_arrow[ROUTER].register_buffer("prototypes", prototypes(layer).to(lora_A.dtype), persistent=False)
        theirs.lora_arrow[ROUTER]._protos_ready = True
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable and ".task_" in name)
    return model.train(trainable)


def forward_bytes(tokens: int, experts: int, rank: int, base_linears: dict[str, nn.Linear], trains: bool) -> int:
    """What its forward needs beside weights: two tensors (T, E, O) and the stacked factors of the widest module.

    For a backward, one (T, E, O) and the stacked factors of every module are kept.
    """
    shapes = [(*linear.weight.shape, linear.weight.itemsize) for linear in base_linears.values()]
    each = [(tokens * experts * out * size, experts * rank * (out + width) * size) for out, width, size in shapes]
    peak = max(2 * made + stacked for made, stacked in each)
    return peak + sum(made + stacked for made, stacked in each) if trains else peak
