"""What an adapter's files say in terms of plain low-rank updates, or why they cannot be said so."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.other import EMBEDDING_LAYER_NAMES, get_pattern_key

from .adapter import Adapter


KEY_PREFIX = "base_model.model."

REFUSED = {
    "use_dora": "DoRA rescales the whole weight by a learned magnitude",
    "lora_bias": "a bias on lora_B is not a low-rank update of the weight",
    "trainable_token_indices": "trained token embeddings replace rows of the embedding for every token",
    "target_parameters": "updates of parameters inside MoE layers are not updates of a linear module",
    "alora_invocation_tokens": "aLoRA applies only after its invocation tokens",
    "use_qalora": "QALoRA pools the input in groups",
    "use_bdlora": "BD-LoRA uses block-diagonal factors",
    "kasa_config": "KaSA inserts learned singular values",
    "velora_config": "VeLoRA changes how activations are stored for training",
    "monteclora_config": "MonteCLoRA samples its weights",
    "arrow_config": "it is a router of PEFT's Arrow, not an expert; pass the folder that holds task_0, task_1, ...",
    "megatron_config": "Megatron's parallel layers are not supported",
}
NAMES = (str, list, tuple, set, type(None))
CONFIG_TYPES = {
    "target_modules": NAMES,
    "exclude_modules": NAMES,
    "modules_to_save": (list, tuple, set, type(None)),
    "layers_to_transform": (int, list, tuple, type(None)),
    "layers_pattern": NAMES,
    "rank_pattern": (dict, type(None)),
    "alpha_pattern": (dict, type(None)),
    "lora_dropout": (int, float, type(None)),
    "use_rslora": (bool, type(None)),
}
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
KEPT_BASE_CHANGING_INITS = ("pissa", "olora")


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
    """An adapter's files, taken apart.

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


def check_kind(name: str, source: str, config: Mapping[str, Any]) -> None:
    """Raise a `ValueError` that names the feature and the reason if the adapter is not a plain LoRA."""
    peft_type = str(getattr(config.get("peft_type"), "value", config.get("peft_type")))
    if peft_type == "ARROW_LORA":
        raise ValueError(
            f"adapter {name!r} ({source}): it is a saved routed model, not an expert; load it with "
            "PeftModel.from_pretrained(base, folder)."
        )
    if peft_type != "LORA":
        raise ValueError(
            f"adapter {name!r} ({source}): peft_type is {peft_type!r}; only 'LORA' adapters can be routed."
        )
    for option, reason in REFUSED.items():
        if config.get(option):
            raise ValueError(f"adapter {name!r} ({source}): {option}={config[option]!r} is not supported: {reason}.")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(BASE_CHANGING_INITS) and init not in KEPT_BASE_CHANGING_INITS:
        raise ValueError(
            f"adapter {name!r} ({source}): init_lora_weights={init!r} changed the base weights in training, and the "
            "adapter's files do not tell how; save it with path_initial_model_for_weight_conversion, which makes a "
            "plain LoRA of it."
        )


def _check_types(adapter: Adapter) -> None:
    """A file from elsewhere may say anything; what PEFT would choke on later is refused here, by name."""
    config = adapter.config
    for field, types in CONFIG_TYPES.items():
        if not isinstance(config.get(field), types):
            allowed = ", ".join("None" if kind is type(None) else kind.__name__ for kind in types)
            raise ValueError(
                f"{_where(adapter)}: its config has {field}={config[field]!r}; allowed types are {allowed}."
            )
    if not 0 <= (config.get("lora_dropout") or 0) < 1:
        raise ValueError(
            f"{_where(adapter)}: its config has lora_dropout={config['lora_dropout']!r}; it must be in [0, 1)."
        )
    patterns = [config.get("target_modules"), config.get("exclude_modules")]
    patterns += [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]
    for pattern in (pattern for pattern in patterns if isinstance(pattern, str)):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{_where(adapter)}: its config has {pattern!r}, which is no regular expression: {error}."
            ) from error


def read_lora(adapter: Adapter) -> LoraContent:
    """Take the adapter's tensors apart and check them.

    Raises:
        ValueError: a tensor is missing, unexpected, misshapen, not finite, or the whole update is zero.
    """
    check_kind(adapter.name, adapter.source, adapter.config)
    _check_types(adapter)
    halves, saved, copies = _sort_tensors(adapter)
    if not halves:
        raise ValueError(f"{_where(adapter)}: the file holds no lora_A and lora_B tensors.")
    factors = {module: _factors(adapter, module, halves[module]) for module in sorted(halves)}
    if all(not factor.lora_B.any() or not factor.lora_A.any() for factor in factors.values()):
        raise ValueError(f"{_where(adapter)}: the whole update is zero (lora_A or lora_B is 0 in every module).")
    modules_to_save = tuple(name for name in adapter.config.get("modules_to_save") or [] if _owns_any(name, saved))
    return LoraContent(factors, saved, modules_to_save, copies, float(adapter.config.get("lora_dropout") or 0.0))


def _where(adapter: Adapter) -> str:
    return f"adapter {adapter.name!r} ({adapter.source})"


def _sort_tensors(adapter: Adapter):
    halves: dict[str, dict[str, torch.Tensor]] = {}
    saved: dict[str, torch.Tensor] = {}
    copies: dict[str, torch.Tensor] = {}
    modules_to_save = list(adapter.config.get("modules_to_save") or [])
    unexpected = []
    for key, tensor in adapter.tensors.items():
        path = key.removeprefix(KEY_PREFIX)
        module, _, half = path.rpartition(".lora_")
        if half in ("A.weight", "B.weight"):
            halves.setdefault(module, {})[half[0]] = tensor
        elif "lora_embedding_" in path:
            raise ValueError(
                f"{_where(adapter)}: {key} adapts an embedding, which is not supported: routing scores the input of a "
                "linear module, and an embedding's input is a token id."
            )
        elif "lora_magnitude_vector" in path:
            raise ValueError(
                f"{_where(adapter)}: {key} belongs to DoRA, which is not supported: {REFUSED['use_dora']}."
            )
        elif _belongs_to(path, modules_to_save):
            saved[path] = tensor
        elif _is_copy(path, adapter.config):
            copies[path.replace(".base_layer.", ".")] = tensor
        else:
            unexpected.append(key)
    if unexpected:
        raise ValueError(
            f"{_where(adapter)}: {len(unexpected)} tensors are neither LoRA factors nor listed in modules_to_save: "
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
        raise ValueError(f"{_where(adapter)}: the tensor {missing[0]} is missing.")
    lora_A, lora_B = halves["A"], halves["B"]
    if lora_A.dim() != 2 or lora_B.dim() != 2:
        raise ValueError(
            f"{_where(adapter)}: {module} has lora_A of shape {tuple(lora_A.shape)} and lora_B of shape "
            f"{tuple(lora_B.shape)}; only linear modules, with two dimensions each, are supported."
        )
    rank, scaling = _rank_and_scaling(adapter, module)
    if lora_A.shape[0] != rank or lora_B.shape[1] != rank:
        raise ValueError(
            f"{_where(adapter)}: {module} has lora_A of shape {tuple(lora_A.shape)} and lora_B of shape "
            f"{tuple(lora_B.shape)}, but its config says rank {rank}."
        )
    for half, tensor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ValueError(f"{_where(adapter)}: {module}.{half} holds NaN, Inf or no floating-point numbers.")
    return Factors(lora_A, lora_B, scaling)


def _rank_and_scaling(adapter: Adapter, module: str) -> tuple[int, float]:
    config = adapter.config
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(ranks.keys(), module), config.get("r", 8))
    alpha = alphas.get(get_pattern_key(alphas.keys(), module), config.get("lora_alpha", 8))
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(
            f"{_where(adapter)}: its config gives {module} rank {rank!r}; it must be a whole number of at least 1."
        )
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not is_number or not math.isfinite(alpha) or alpha == 0:
        raise ValueError(
            f"{_where(adapter)}: its config gives {module} lora_alpha {alpha!r}; it must be finite and not 0."
        )
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
