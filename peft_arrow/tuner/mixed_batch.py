"""`adapter_names=[...]` in forward and generate: one adapter, expert or the bare base per row of the batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .layer import ArrowLoraLayer


BASE = "__base__"


@contextlib.contextmanager
def row_target_hooks(tuner: BaseTuner, adapter_names: list[str], kwargs: dict[str, Any]) -> Iterator[None]:
    """While open, every layer treats row b as `adapter_names[b]` says.

    Raises:
        ValueError: the model trains, or a name is neither an adapter nor an expert of the active adapter nor
            `"__base__"`.
    """
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    if not isinstance(adapter_names, (list, tuple)):
        raise TypeError(f"adapter_names={adapter_names!r} is not allowed; it is a list with one name per batch row.")
    targets = [_target(tuner, name) for name in adapter_names]
    adapters = [target[0] if target is not None else BASE for target in targets]
    beams = kwargs.get("num_beams") or 1
    encoder = _encoder(tuner.model)
    inside_encoder = {id(module) for module in encoder.modules()} if encoder is not None else set()
    handles = []
    for module in tuner.model.modules():
        # beam search repeats each row for the decoder, not for the encoder of an encoder-decoder
        repeats = 1 if id(module) in inside_encoder else beams
        if isinstance(module, ArrowLoraLayer):
            hook = _add_kwarg("row_targets", [target for target in targets for _ in range(repeats)])
        elif isinstance(module, AuxiliaryTrainingWrapper):
            hook = _add_kwarg("adapter_names", [name for name in adapters for _ in range(repeats)])
        else:
            continue
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def pin_hooks(tuner: BaseTuner, pins: Sequence[Mapping[int, float]]) -> Iterator[None]:
    """While open, every layer sends row b of the batch to the experts of `pins[b]` (position -> weight).

    Beam search and several answers a prompt repeat the rows, which the layers see and follow.
    """
    handles = [
        module.register_forward_pre_hook(_add_kwarg("pins", list(pins)), with_kwargs=True)
        for module in tuner.model.modules()
        if isinstance(module, ArrowLoraLayer)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _target(tuner, name: str) -> tuple[str, int | None] | None:
    if name == BASE:
        return None
    if name in tuner.peft_config:
        return name, None
    for adapter_name in tuner.active_adapters:
        names = tuner.peft_config[adapter_name].expert_names
        if name in names:
            return adapter_name, names.index(name)
    allowed = [
        BASE,
        *tuner.peft_config,
        *(n for a in tuner.active_adapters for n in tuner.peft_config[a].expert_names),
    ]
    raise ValueError(
        f"adapter_names holds {name!r}, which is not an adapter or expert of the model; allowed: {allowed}."
    )


def _encoder(model: nn.Module) -> nn.Module | None:
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return None
    return model.get_encoder()


def _add_kwarg(name: str, value: list):
    def hook(module, args, kwargs):
        return args, {**kwargs, name: value}

    return hook
