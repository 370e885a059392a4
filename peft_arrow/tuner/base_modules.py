"""The modules of a base model as adapters see them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..library.adapter import Adapter
from .layer import ArrowLoraLayer


class BaseModules:
    """The linear modules of a base model, by name, and which of them an adapter's config targets."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config = BaseTuner.get_model_config(model)
        self.modules = dict(unwrapped_modules(model))
        self.initial_factors: dict[tuple, tuple] = {}
        self._targets: dict[str, set[str]] = {}

    def targets(self, adapter: Adapter) -> set[str]:
        """Names of the modules that plain PEFT would adapt for this adapter."""
        options = {
            name: adapter.config.get(name)
            for name in (
                "target_modules",
                "exclude_modules",
                "layers_to_transform",
                "layers_pattern",
                "modules_to_save",
                "task_type",
            )
        }
        key = repr(options)
        if key not in self._targets:
            self._targets[key] = self._match(options)
        return self._targets[key]

    def parameter(self, path: str) -> torch.Tensor | None:
        """The base's own parameter of that name, seen through PEFT's wrappers."""
        owner, _, name = path.rpartition(".")
        module = self.modules.get(owner)
        return getattr(getattr(module, "original_module", module), name, None)

    def _match(self, options: dict[str, Any]) -> set[str]:
        if options["target_modules"] is None:
            options["target_modules"] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(
                self.config.get("model_type")
            )
        lora = _maybe_include_all_linear_layers(LoraConfig(**options), self.model)
        return {name for name in self.modules if name and is_match(check_target_module_exists(lora, name))}


def is_match(result: Any) -> bool:
    """Whether PEFT's matcher said yes (it answers True, a match object, None, False or an exclusion marker)."""
    return result is True or isinstance(result, re.Match)


def unwrapped_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the base's own modules, seen through tuner layers that wrap them."""
    inside = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        inside = None
        if isinstance(module, ArrowLoraLayer):
            inside = f"{name}."
            yield name, module.get_base_layer()
        else:
            yield name, module


def is_supported(module: nn.Module) -> bool:
    """Whether routed LoRA can wrap the module."""
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    backend = resolve_quantization_backend(module)
    return backend is not None and backend.layer_type == "linear"
