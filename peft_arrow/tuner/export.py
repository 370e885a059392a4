"""One plain PEFT LoRA from a routed model: the weighted mean of the experts' delta-W."""

from __future__ import annotations

import os
import tempfile
from os import PathLike
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import save_file
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from ..library.lora import KEY_PREFIX
from ..library.low_rank import truncated
from ..library.serving import served_rank
from .heads import saved_modules


METHODS = ("svd", "cat")


def export_lora(
    tuner: BaseTuner, folder: str | PathLike, *, weights: str | dict[str, float], rank: int | None, method: str
) -> dict[str, Any]:
    """Write sum_i w_i delta-W_i of the active adapter's experts as a LoRA that plain PEFT loads; alpha is in lora_B.

    Args:
        tuner (`ArrowLoraModel`): the routed model.
        folder (`str` or `PathLike`): where to write; files of an earlier export are replaced one by one.
        weights (`"uniform"` or `dict[str, float]`):
            `"uniform"`: 1 / number of experts each. A dict: expert name -> weight, missing ones 0, used as given.
        rank (`int`, *optional*):
            Rank of the result for `"svd"`; by default the largest rank of an expert, up to the next of vLLM's ranks.
        method (`str`):
            `"svd"`: best approximation of that rank. `"cat"`: exact; the rank is the sum of the ranks, up to the next
            of vLLM's ranks.

    Returns:
        `dict`: `rank`, one for all modules, because servers such as vLLM read one (those of lower rank are filled with
        zeros), and `lost_norm` (share of the Frobenius norm that the rank cuts off).

    Raises:
        ValueError: an unknown method, expert or rank.
    """
    adapter_name = tuner.active_arrow_adapter()
    config = tuner.peft_config[adapter_name]
    expert_weights = _expert_weights(weights, config.expert_names)
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; allowed are {', '.join(map(repr, METHODS))}.")
    if rank is not None and (method == "cat" or isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(
            f"rank={rank!r} is not allowed; it is a whole number of at least 1, and only for method='svd'."
        )
    layers = tuner.routed_layers(adapter_name)
    if rank is None:
        needed = max if method == "svd" else sum
        rank = served_rank(max(needed(layer.experts[adapter_name].ranks) for layer in layers.values()))
    tensors, kept, lost = {}, 0.0, 0.0
    for module, layer in layers.items():
        lora_A, lora_B = _concatenated(layer, adapter_name, expert_weights)
        if method == "svd":
            lora_A, lora_B, kept_here, lost_here = truncated(lora_A, lora_B, rank)
            kept, lost = kept + kept_here, lost + lost_here
        missing = rank - lora_A.shape[0]
        tensors[f"{KEY_PREFIX}{module}.lora_A.weight"] = pad(lora_A, (0, 0, 0, missing))
        tensors[f"{KEY_PREFIX}{module}.lora_B.weight"] = pad(lora_B, (0, missing)).contiguous()
    is_conv1d = any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values())
    lora = _lora_config(config, rank, list(layers), is_conv1d)
    _write(folder, lora, {**tensors, **_head_tensors(tuner, adapter_name)})
    return {"rank": rank, "lost_norm": (lost / (kept + lost)) ** 0.5 if kept + lost else 0.0}


def _expert_weights(weights: str | dict[str, float], names: list[str]) -> list[float]:
    if weights == "uniform":
        return [1.0 / len(names)] * len(names)
    if not isinstance(weights, dict):
        raise ValueError(f"weights={weights!r} is not allowed; it is 'uniform' or a dict expert name -> weight.")
    unknown = [name for name in weights if name not in names]
    if unknown:
        raise ValueError(f"weights holds {unknown[0]!r}, which is not an expert; experts are {names}.")
    return [float(weights.get(name, 0.0)) for name in names]


@torch.no_grad()
def _concatenated(layer, adapter_name: str, weights: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """A (sum of ranks, I) and B (O, sum of ranks) whose product is the weighted sum, float32 on the CPU."""
    experts = layer.experts[adapter_name]
    lora_A, lora_B = zip(*layer.expert_factors(adapter_name), strict=True)
    scaled = [
        B.float() * (weights[position] * scaling * layer.scales[adapter_name])
        for B, position, scaling in zip(lora_B, experts.positions, experts.scalings, strict=True)
    ]
    return torch.cat([A.float().cpu() for A in lora_A]), torch.cat([half.cpu() for half in scaled], dim=1)


def _head_tensors(tuner, adapter_name: str) -> dict[str, torch.Tensor]:
    return {
        f"{KEY_PREFIX}{key}": tensor.detach().cpu().contiguous()
        for key, tensor in saved_modules(tuner.model, adapter_name).items()
    }


def _lora_config(config, rank: int, modules: list[str], fan_in_fan_out: bool) -> LoraConfig:
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(modules),
        modules_to_save=sorted(config.modules_to_save) if config.modules_to_save else None,
        layer_replication=config.layer_replication,
        fan_in_fan_out=fan_in_fan_out,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )


def _write(folder: str | PathLike, lora: LoraConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Write beside the target and move into place, weights first, so that a half-written export is never read."""
    folder = os.fspath(folder)
    parent = os.path.dirname(os.path.abspath(folder))
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".export-") as draft:
        save_file(tensors, os.path.join(draft, "adapter_model.safetensors"), metadata={"format": "pt"})
        lora.save_pretrained(draft)
        os.makedirs(folder, exist_ok=True)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            os.replace(os.path.join(draft, name), os.path.join(folder, name))
