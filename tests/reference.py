"""Routed LoRA written from the formulas, token by token and expert by expert, in float64 numpy.

Shares no function with `peft_arrow`: adapters are read with `json` and `safetensors.numpy`, prototypes are singular
vectors of the dense update, routing is a sort.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


@dataclass
class DenseExpert:
    """One expert in one module: its dense update without scaling, the scaling, the factors and the prototype."""

    A: np.ndarray
    B: np.ndarray
    scaling: float
    prototype: np.ndarray


def read_experts(folders: list[str]) -> dict[str, dict[int, DenseExpert]]:
    """module -> position of the adapter in the list -> expert."""
    modules: dict[str, dict[int, DenseExpert]] = {}
    for position, folder in enumerate(folders):
        config = json.loads(Path(folder, "adapter_config.json").read_text())
        tensors = load_file(str(Path(folder, "adapter_model.safetensors")))
        for key in sorted(tensors):
            if not key.endswith(".lora_A.weight"):
                continue
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            A = tensors[key].astype(np.float64)
            B = tensors[key.replace("lora_A", "lora_B")].astype(np.float64)
            rank = lookup(config["rank_pattern"], module, config["r"])
            alpha = lookup(config["alpha_pattern"], module, config["lora_alpha"])
            scaling = alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank
            prototype = np.linalg.svd(B @ A)[2][0]
            modules.setdefault(module, {})[position] = DenseExpert(A, B, scaling, prototype)
    return modules


def lookup(pattern: dict, module: str, default: float) -> float:
    """PEFT's rule: the key matches the end of the module's name."""
    return next((value for key, value in pattern.items() if re.fullmatch(rf"(.*\.)?({key})", module)), default)


def route(x: np.ndarray, experts: dict[int, DenseExpert], top_k: int, temperature: float = 1.0):
    """Arrow for one token: {position: weight} of the chosen, and the gap between the k-th and the next score."""
    scores = sorted(((abs(float(x @ e.prototype)), p) for p, e in experts.items()), reverse=True)
    kept = scores[:top_k]
    gap = kept[-1][0] - scores[top_k][0] if len(scores) > top_k else math.inf
    exponentials = [math.exp((score - kept[0][0]) / temperature) for score, _ in kept]
    return {p: e / sum(exponentials) for (_, p), e in zip(kept, exponentials, strict=True)}, gap


def uniform(experts: dict[int, DenseExpert]) -> dict[int, float]:
    """The same weight for every expert of the module."""
    return {position: 1.0 / len(experts) for position in experts}


def routed_update(x: np.ndarray, experts: dict[int, DenseExpert], weights: dict[int, float], aggregation: str):
    """The update of one token's output."""
    if aggregation == "output":
        return sum(w * experts[p].scaling * (experts[p].B @ (experts[p].A @ x)) for p, w in weights.items())
    mixed_A = sum(w * experts[p].A for p, w in weights.items())
    mixed_B = sum(w * experts[p].scaling * experts[p].B for p, w in weights.items())
    return mixed_B @ (mixed_A @ x)
