"""What an adapter's files say in terms of plain low-rank updates, or why they cannot be said so."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from peft.utils.other import EMBEDDING_LAYER_NAMES, get_pattern_key

from .adapter import Adapter
from .fields import short
from .files import WeightsFile
from .lora_config import REFUSED, check_config


KEY_PREFIX = "base_model.model."
# What safetensors calls the dtypes that factors can have.
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Factors:
    """One expert's update of one module: delta W = scaling * lora_B @ lora_A.

    Args:
        lora_A (`torch.Tensor`): (r, I).
        lora_B (`torch.Tensor`): (O, r).
        scaling (`float`): alpha / r, or alpha / sqrt(r) with rslora.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float


@dataclass(frozen=True)
class LoraContent:
    """An adapter's files, taken apart; in an outline the tensors are on the meta device.

    Args:
        factors (`dict[str, Factors]`): by the base's module name.
        saved (`dict[str, torch.Tensor]`): fully trained modules (`modules_to_save`), by parameter name.
        saved_modules (`tuple[str, ...]`): the entries of the config's `modules_to_save`.
        copies (`dict[str, torch.Tensor]`):
            other parameters of the base that the file holds, by name: biases (`bias="all"`) and embeddings, which PEFT
            saves when the vocabulary was resized or the output layer is a target.
        dropout (`float`): the adapter's `lora_dropout`.
    """

    factors: dict[str, Factors]
    saved: dict[str, torch.Tensor]
    saved_modules: tuple[str, ...]
    copies: dict[str, torch.Tensor]
    dropout: float


def outline_lora(adapter: Adapter) -> LoraContent:
    """What the adapter holds, without values: its tensors have a dtype and a shape; of a file only the header is read.

    Raises:
        ValueError: the adapter is no plain LoRA, or a tensor is missing, unexpected or misshapen.
    """
    check_config(adapter)
    return _take_apart(adapter, _without_values(adapter.tensors))


def read_lora(adapter: Adapter) -> LoraContent:
    """Take the adapter's tensors apart and check them.

    Raises:
        ValueError: as `outline_lora`; or a factor is not finite, or the whole update is zero.
    """
    check_config(adapter)
    content = _take_apart(adapter, adapter.tensors)
    for module, factor in content.factors.items():
        for half, tensor in (("lora_A", factor.lora_A), ("lora_B", factor.lora_B)):
            if not torch.isfinite(tensor).all():
                raise _no_numbers(adapter, f"{module}.{half}")
    if all(not factor.lora_B.any() or not factor.lora_A.any() for factor in content.factors.values()):
        raise ValueError(f"{adapter.where}: the whole update is zero (lora_A or lora_B is 0 in every module).")
    return content


def _without_values(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not isinstance(tensors, WeightsFile):
        return {key: _blank(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    tensors.path()  # a file on the Hub is downloaded now: it will be read, and its header is then not asked for apart
    return {
        key: _blank(FLOAT_DTYPES.get(header.dtype, torch.uint8), header.shape)
        for key, header in tensors.header().items()
    }


@lru_cache(maxsize=1024)
def _blank(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _take_apart(adapter: Adapter, tensors: Mapping[str, torch.Tensor]) -> LoraContent:
    halves, saved, copies = _sort_tensors(adapter, tensors)
    if not halves:
        raise ValueError(f"{adapter.where}: the file holds no lora_A and lora_B tensors.")
    factors = {module: _factors(adapter, module, halves[module]) for module in sorted(halves)}
    modules_to_save = tuple(name for name in adapter.config.get("modules_to_save") or [] if _owns_any(name, saved))
    return LoraContent(factors, saved, modules_to_save, copies, float(adapter.config.get("lora_dropout") or 0.0))


def _no_numbers(adapter: Adapter, factor: str) -> ValueError:
    return ValueError(f"{adapter.where}: {factor} holds NaN, Inf or no floating-point numbers of 16, 32 or 64 bits.")


def _sort_tensors(adapter: Adapter, tensors: Mapping[str, torch.Tensor]):
    halves: dict[str, dict[str, torch.Tensor]] = {}
    saved: dict[str, torch.Tensor] = {}
    copies: dict[str, torch.Tensor] = {}
    modules_to_save = list(adapter.config.get("modules_to_save") or [])
    unexpected = []
    for key, tensor in tensors.items():
        path = key.removeprefix(KEY_PREFIX)
        module, _, half = path.rpartition(".lora_")
        if half in ("A.weight", "B.weight"):
            halves.setdefault(module, {})[half[0]] = tensor
        elif "lora_embedding_" in path:
            raise ValueError(
                f"{adapter.where}: {key} adapts an embedding, which is not supported: routing scores the input of a "
                "linear module, and an embedding's input is a token id."
            )
        elif "lora_magnitude_vector" in path:
            raise ValueError(f"{adapter.where}: {key} belongs to DoRA, which is not supported: {REFUSED['use_dora']}.")
        elif _belongs_to(path, modules_to_save):
            saved[path] = tensor
        elif _is_copy(path, adapter.config):
            copies[path.replace(".base_layer.", ".")] = tensor
        else:
            unexpected.append(key)
    if unexpected:
        raise ValueError(
            f"{adapter.where}: {len(unexpected)} tensors are neither LoRA factors nor listed in modules_to_save: "
            f"{', '.join(unexpected[:3])}."
        )
    return halves, saved, copies


def _is_copy(path: str, config: Mapping[str, Any]) -> bool:
    parameter = path.removesuffix(".base_layer.weight").removesuffix(".weight").rpartition(".")[2]
    return (path.endswith(".bias") and config.get("bias", "none") != "none") or parameter in EMBEDDING_LAYER_NAMES


def _owns_any(name: str, saved: Mapping[str, torch.Tensor]) -> bool:
    return any(_belongs_to(path, [name]) for path in saved)


def _belongs_to(path: str, modules_to_save: list[str]) -> bool:
    owner = path.rpartition(".")[0]
    return any(f".{name}." in f".{owner}." for name in modules_to_save)


def _factors(adapter: Adapter, module: str, halves: dict[str, torch.Tensor]) -> Factors:
    missing = [f"{module}.lora_{half}.weight" for half in "AB" if half not in halves]
    if missing:
        raise ValueError(f"{adapter.where}: the tensor {missing[0]} is missing.")
    lora_A, lora_B = halves["A"], halves["B"]
    if lora_A.dim() != 2 or lora_B.dim() != 2:
        raise ValueError(
            f"{adapter.where}: {module} has lora_A of shape {tuple(lora_A.shape)} and lora_B of shape "
            f"{tuple(lora_B.shape)}; only linear modules, with two dimensions each, are supported."
        )
    rank, scaling = _rank_and_scaling(adapter, module)
    if lora_A.shape[0] != rank or lora_B.shape[1] != rank:
        raise ValueError(
            f"{adapter.where}: {module} has lora_A of shape {tuple(lora_A.shape)} and lora_B of shape "
            f"{tuple(lora_B.shape)}, but its config says rank {rank}."
        )
    for half, tensor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if tensor.dtype not in FLOAT_DTYPES.values():
            raise _no_numbers(adapter, f"{module}.{half}")
    return Factors(lora_A, lora_B, scaling)


def _rank_and_scaling(adapter: Adapter, module: str) -> tuple[int, float]:
    config = adapter.config
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(ranks.keys(), module), config.get("r", 8))
    alpha = alphas.get(get_pattern_key(alphas.keys(), module), config.get("lora_alpha", 8))
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(
            f"{adapter.where}: its config gives {module} rank {rank!r}; it must be a whole number of at least 1."
        )
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not is_number or not 0 < abs(alpha) <= sys.float_info.max:
        raise ValueError(
            f"{adapter.where}: its config gives {module} lora_alpha {short(alpha)}; it must be finite and not 0."
        )
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
