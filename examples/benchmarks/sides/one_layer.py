"""One linear layer as a model: alone with random inputs, or out of a base with the inputs that a text gives it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from .bases import linear_modules
from .experts import Experts
from .setting import Setting


class OneLayer(nn.Module):
    """A model of a single linear module.

    Args:
        linear (`nn.Linear`): the module.
        name (`str`): its name.
    """

    def __init__(self, linear: nn.Linear, name: str = "linear") -> None:
        super().__init__()
        self.name = name
        self.add_module(name, linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., I) -> (..., O)."""
        return self.get_submodule(self.name)(x)


def random_layer(sizes: tuple[int, int], tokens: int, device: torch.device, dtype: torch.dtype):
    """A layer (I, O) with random weights, and standard normal inputs (1, tokens, I)."""
    generator = torch.Generator(device).manual_seed(0)
    linear = nn.Linear(*sizes, bias=False, device=device, dtype=dtype)
    with torch.no_grad():
        linear.weight.normal_(std=sizes[0] ** -0.5, generator=generator)
    x = torch.randn(1, tokens, sizes[0], generator=generator, device=device, dtype=dtype)
    return OneLayer(linear), x


@torch.no_grad()
def layer_of_base(setting: Setting, experts: Experts, sizes: tuple[int, int], tokens: int):
    """A layer of these sizes from the middle of the base, its experts, and its inputs for the text, (1, tokens, I).

    Raises:
        ValueError: the base has no such layer.
    """
    fitting = [
        name
        for name, linear in linear_modules(setting.base).items()
        if (linear.in_features, linear.out_features) == sizes
    ]
    if not fitting:
        raise ValueError(f"--sizes {sizes[0]}x{sizes[1]}: the base has no layer of these sizes.")
    name = fitting[len(fitting) // 2]
    parent, _, last = name.rpartition(".")
    linear, seen = setting.base.get_submodule(name), []
    hook = linear.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    try:
        setting.base(input_ids=setting.ids("trained", tokens), use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return OneLayer(linear, last), replace(experts, within=f"{parent}."), seen[0]
