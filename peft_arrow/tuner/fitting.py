"""One adapter and a base model: first the checks that need no weights, then the weights."""

from __future__ import annotations

import torch

from ..library.adapter import Adapter
from ..library.base_modules import BaseModules
from ..library.lora import Factors, LoraContent, outline_lora, read_lora
from .base_change import undo_base_change


def outline_on_base(adapter: Adapter, base: BaseModules) -> LoraContent:
    """What the adapter adds to this base, without values (tensors on the meta device).

    Raises:
        ValueError: a module is missing on either side, has another width, or is of an unsupported kind.
    """
    outline = outline_lora(adapter)
    where = adapter.where
    unknown = [module for module in outline.factors if module not in base.modules]
    if unknown:
        raise ValueError(
            f"{where}: the base model has no module {unknown[0]!r} ({len(unknown)} of {len(outline.factors)} modules "
            "are missing there); is the adapter for another base?"
        )
    targets = base.targets(adapter.config)
    absent = sorted(targets - set(outline.factors))
    if absent:
        raise ValueError(
            f"{where}: its config targets {absent[0]!r}, but the file has no tensors for it ({len(absent)} modules "
            "are missing in the file)."
        )
    untargeted = sorted(set(outline.factors) - targets)
    if untargeted:
        raise ValueError(
            f"{where}: the file has tensors for {untargeted[0]!r}, which its config does not target "
            f"({len(untargeted)} such modules)."
        )
    for module, factor in outline.factors.items():
        _check_module(where, module, factor, base)
    _check_saved_shapes(where, outline, base)
    return undo_base_change(adapter, outline, base.modules, base.initial_factors)


def read_on_base(adapter: Adapter, base: BaseModules) -> LoraContent:
    """What the adapter adds to this base, once its outline has passed; its file is read once.

    Raises:
        ValueError: a value is not finite, the whole update is zero, or a copied parameter is not the base's.
    """
    content = read_lora(adapter)
    for key, tensor in content.saved.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{adapter.where}: {key} holds NaN or Inf.")
    for key, tensor in content.copies.items():
        known = base.parameter(key)
        if not torch.equal(known.detach().cpu(), tensor.to(known.dtype)):
            raise _other_values(adapter.where, key)
    return undo_base_change(adapter, content, base.modules, base.initial_factors)


def _check_module(where: str, name: str, factor: Factors, base: BaseModules) -> None:
    expected = base.features(name)
    if expected is None:
        raise ValueError(
            f"{where}: {name} is a {type(base.modules[name]).__name__}; supported are Linear, Conv1D of transformers "
            "and quantised linear modules."
        )
    found = (factor.lora_A.shape[1], factor.lora_B.shape[0])
    if expected != found:
        raise ValueError(
            f"{where}: {name} maps {found[0]} to {found[1]} features in the adapter, {expected[0]} to {expected[1]} "
            "in the base model; is the adapter for another base?"
        )


def _check_saved_shapes(where: str, outline: LoraContent, base: BaseModules) -> None:
    for key, tensor in outline.saved.items():
        known = base.parameter(key)
        if known is None or known.shape != tensor.shape:
            found = "nothing" if known is None else f"shape {tuple(known.shape)}"
            raise ValueError(
                f"{where}: the trained module's {key!r} has shape {tuple(tensor.shape)}, the base model has {found} "
                "there."
            )
    for key, tensor in outline.copies.items():
        known = base.parameter(key)
        if known is None or known.shape != tensor.shape:
            raise _other_values(where, key)


def _other_values(where: str, key: str) -> ValueError:
    return ValueError(
        f"{where}: the file holds {key!r} with other values than the base model, which a routed low-rank update "
        "cannot express (a trained bias, or an embedding that was resized or trained)."
    )
