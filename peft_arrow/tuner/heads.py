"""Modules trained in full beside the experts (`modules_to_save`), such as a classification head."""

from __future__ import annotations

import torch
from peft.utils.other import ModulesToSaveWrapper


def saved_modules(model: torch.nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """The adapter's fully trained modules (heads), by the base's parameter names."""
    return {
        f"{name}.{key}": tensor
        for name, wrapper in model.named_modules()
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save
        for key, tensor in wrapper.modules_to_save[adapter_name].state_dict().items()
    }


def load_saved_modules(model: torch.nn.Module, adapter_name: str, saved: dict[str, torch.Tensor]) -> None:
    """Put an expert's fully trained modules in place of the copies that PEFT made of the base's."""
    for name, wrapper in model.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save:
            own = {key.removeprefix(f"{name}."): value for key, value in saved.items() if key.startswith(f"{name}.")}
            wrapper.modules_to_save[adapter_name].load_state_dict(own, strict=False)
