"""Modules trained in full beside the experts (`modules_to_save`), such as a classification head."""

from __future__ import annotations

import torch
from peft.utils.other import ModulesToSaveWrapper

from ..library.lora import LoraContent
from .config import ArrowLoraConfig


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


def head_owners(config: ArrowLoraConfig, outlines: list[LoraContent]) -> list[str]:
    """The experts that bring fully trained modules."""
    return [name for name, outline in zip(config.expert_names, outlines, strict=True) if outline.saved]


def kept_head(
    config: ArrowLoraConfig,
    head: dict[str, torch.Tensor],
    name: str,
    saved: dict[str, torch.Tensor],
    outlines: list[LoraContent],
) -> dict[str, torch.Tensor]:
    """The one head that the routed model gets: the chosen expert's, or the one that all experts share.

    Args:
        config (`ArrowLoraConfig`): of the model.
        head (`dict[str, torch.Tensor]`): what was kept of the experts before.
        name (`str`): the next expert.
        saved (`dict[str, torch.Tensor]`): what it brings.
        outlines (`list[LoraContent]`): of all experts.

    Raises:
        ValueError: experts bring different ones and `modules_to_save_from` does not say whose to take.
    """
    chosen = config.modules_to_save_from
    if name == chosen or (chosen is None and not head):
        return saved
    if chosen is None and not _same_tensors(saved, head):
        owners = head_owners(config, outlines)
        raise ValueError(
            f"the experts {owners[0]!r} and {name!r} bring different trained modules "
            f"({', '.join(sorted(head))}), and a routed model has one of each; pass "
            f"modules_to_save_from=<name of the expert whose to take>; allowed are {owners}."
        )
    return head


def _same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
