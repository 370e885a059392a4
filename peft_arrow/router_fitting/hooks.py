"""Reading the inputs of routed layers while a model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn


@contextlib.contextmanager
def reading_inputs(
    layers: Mapping[str, nn.Module], read: Callable[[str, nn.Module, torch.Tensor], None]
) -> Iterator[None]:
    """While open, `read(name, layer, x)` sees what each layer gets."""
    handles = []

    def hook_of(name: str) -> Callable:
        def hook(layer, args, kwargs):
            read(name, layer, args[0] if args else next(iter(kwargs.values())))

        return hook

    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(hook_of(name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
