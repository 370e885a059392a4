"""The modules of a base model as adapters see them; the model may be empty, on the meta device."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D


TARGET_OPTIONS = (
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "task_type"),
)


class BaseModules:
    """The linear modules of a base model, by name, and which of them an adapter's config targets."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config = BaseTuner.get_model_config(model)
        self.modules = dict(unwrapped_modules(model))
        self.initial_factors: dict[tuple, tuple] = {}
        self._targets: dict[str, set[str]] = {}
        self._features: dict[str, tuple[int, int] | None] = {}

    def targets(self, config: Mapping[str, Any]) -> set[str]:
        """Names of the modules that plain PEFT would adapt for an adapter's config.

        Raises:
            ValueError: PEFT refuses the config's options.
        """
        options = {name: config.get(name) for name in TARGET_OPTIONS}
        key = repr(options)
        if key not in self._targets:
            self._targets[key] = self._match(options)
        return self._targets[key]

    def features(self, name: str) -> tuple[int, int] | None:
        """(in, out) features of a module, or None where there is none that routed LoRA can wrap."""
        if name not in self._features:
            module = self.modules.get(name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._features[name] = tuple(_get_in_out_features(module)) if is_supported(module) else None
        return self._features[name]

    def parameter(self, path: str) -> torch.Tensor | None:
        """The base's own parameter of that name, seen through PEFT's wrappers."""
        owner, _, name = path.rpartition(".")
        module = self.modules.get(owner)
        value = getattr(getattr(module, "original_module", module), name, None)
        return value if isinstance(value, torch.Tensor) else None

    def _match(self, options: dict[str, Any]) -> set[str]:
        if options["target_modules"] is None:
            options["target_modules"] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(
                self.config.get("model_type")
            )
        try:
            lora = _maybe_include_all_linear_layers(LoraConfig(**options), self.model)
            return {name for name in self.modules if name and is_match(check_target_module_exists(lora, name))}
        except (TypeError, LookupError, AttributeError, re.error) as error:
            raise ValueError(f"PEFT cannot match its config with the base: {error}") from error


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
        if isinstance(module, BaseTunerLayer):
            inside = f"{name}."
            module = module.get_base_layer()
        yield name, module


def is_supported(module: nn.Module | None) -> bool:
    """Whether routed LoRA can wrap the module."""
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    backend = None if module is None else resolve_quantization_backend(module)
    return backend is not None and backend.layer_type == "linear"
