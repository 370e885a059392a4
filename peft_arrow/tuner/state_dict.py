"""Between the two banks of a live layer and the one stack per layer on disk.

On disk a layer has three tensors, readable without these functions (transformers' own `load_adapter` does not call
them): `arrow_lora_A.weight` (sum of ranks, I), `arrow_lora_B.weight` (O, sum of ranks) and `arrow_lora_router.weight`
(E, I).
"""

from __future__ import annotations

import torch
from torch import nn

from ..routers import ROUTERS, top_right_singular_vectors
from .bank import BANKS, join_banks, split_banks
from .layer import ArrowLoraLayer
from .prototype_state import is_distributed


PEFT_PREFIX = "base_model.model."
PROMPT_PREFIXES = tuple(f"base_model.arrow_lora_{name}." for name, router in ROUTERS.items() if router.is_prompt_level)


def _layers(model: nn.Module, adapter_name: str):
    for name, module in model.named_modules():
        if isinstance(module, ArrowLoraLayer) and adapter_name in module.experts:
            yield name.replace("_fsdp_wrapped_module.", ""), module


def to_checkpoint(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter's entries, the banks of each layer joined and stale prototypes replaced; keys keep the adapter."""
    joined = dict(state_dict)
    for name, layer in _layers(model, adapter_name):
        for side, dim in ((0, 0), (1, 1)):
            main, frozen = (f"{name}.{BANKS[is_main][side]}.{adapter_name}.weight" for is_main in (True, False))
            stack = join_banks(layer.experts[adapter_name], joined.pop(main, None), joined.pop(frozen, None), dim)
            if stack is not None:
                joined[main] = stack.contiguous()
        _refresh(name, layer, adapter_name, joined)
    return joined


def prompt_keys(state_dict: dict[str, torch.Tensor]) -> list[str]:
    """The keys of the prompt-level routers' maps, which belong to the tuner and not to a layer."""
    return [key for key in state_dict if key.startswith(PROMPT_PREFIXES)]


def with_adapter(key: str, adapter_name: str) -> str:
    """A key of `prompt_keys` as a checkpoint has it -> as the live model has it."""
    head, _, parameter = key.rpartition(".")
    return f"{head}.{adapter_name}.{parameter}"


def _refresh(name: str, layer: ArrowLoraLayer, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Sharded layers cannot build in place, so what they hand over may be unbuilt or older than the weights."""
    keys = [f"{name}.arrow_lora_{part}.{adapter_name}.weight" for part in ("A", "B", "router")]
    if any(key not in state_dict or state_dict[key].device.type == "meta" for key in keys):
        return
    lora_A, lora_B, prototypes_EI = (state_dict[key] for key in keys)
    experts = layer.experts[adapter_name]
    stale = torch.isnan(prototypes_EI[:, 0]).nonzero().flatten().tolist()
    if is_distributed() and layer.prototype_updates[adapter_name] == "step":
        stale = sorted({*stale, *experts.bank(True)})
    if stale:
        pieces_A, pieces_B = lora_A.split(list(experts.ranks), dim=0), lora_B.split(list(experts.ranks), dim=1)
        rows = top_right_singular_vectors([pieces_A[e] for e in stale], [pieces_B[e] for e in stale])
        index = torch.tensor(stale, device=prototypes_EI.device)
        state_dict[keys[2]] = prototypes_EI.detach().float().index_copy(0, index, rows.to(prototypes_EI.device))


def from_checkpoint(
    model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The checkpoint's entries with each stack split into the banks that the live layer has (keys without adapter)."""
    split = dict(state_dict)
    for name, layer in _layers(model, adapter_name):
        if not layer.experts[adapter_name].bank(False):
            continue
        for prefix in {name, f"{PEFT_PREFIX}{name}"}:
            for side, dim in ((0, 0), (1, 1)):
                stack = split.pop(f"{prefix}.{BANKS[True][side]}.weight", None)
                if stack is not None:
                    for is_main, weight in split_banks(layer.experts[adapter_name], stack, dim).items():
                        split[f"{prefix}.{BANKS[is_main][side]}.weight"] = weight
    return split
