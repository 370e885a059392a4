"""Which modules of the adapters count, and how much."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..library.adapter import Adapter
from ..library.lora import outline_lora


ModuleShape = tuple[str, int, int]


@dataclass(frozen=True)
class ModuleChoice:
    """Module name -> its weight in every inner product of updates; 0 where it is left out.

    Args:
        layers (`tuple[int, ...]`, *optional*): numbers of the layers that count; a module without a number is out.
        modules (`tuple[str, ...]`, *optional*): names, or last parts of names, of the modules that count.
        weights (`Mapping`): name or last parts of a name (`"o_proj"`, `"mlp.down_proj"`), or number of a layer, ->
            factor of at least 0; where several fit, their product.
    """

    layers: tuple[int, ...] | None
    modules: tuple[str, ...] | None
    weights: Mapping[str | int, float]

    def __call__(self, module: str) -> float:
        layer = layer_number(module)
        if self.layers is not None and layer not in self.layers:
            return 0.0
        if self.modules is not None and not any(_fits(name, module) for name in self.modules):
            return 0.0
        factors = (
            factor
            for key, factor in self.weights.items()
            if (key == layer if isinstance(key, int) else _fits(key, module))
        )
        return math.prod(factors, start=1.0)

    def shapes(self, adapter: Adapter) -> set[ModuleShape]:
        """(module, I, O) of the adapter's modules that count; of a file only the header is read."""
        return {
            (module, factor.lora_A.shape[1], factor.lora_B.shape[0])
            for module, factor in outline_lora(adapter).factors.items()
            if self(module)
        }


def module_choice(
    layers: Iterable[int] | None, modules: Iterable[str] | str | None, weights: Mapping[str | int, float] | None
) -> ModuleChoice:
    """Check the three arguments and make one choice of them.

    Raises:
        ValueError: an empty selection, or a weight that is no finite number of at least 0.
    """
    modules = [modules] if isinstance(modules, str) else modules
    chosen = ModuleChoice(
        None if layers is None else tuple(int(layer) for layer in layers),
        None if modules is None else tuple(modules),
        dict(weights or {}),
    )
    for name, value in (("layers", chosen.layers), ("modules", chosen.modules)):
        if value == ():
            raise ValueError(f"{name} is empty; name at least one, or pass None for all.")
    for key, weight in chosen.weights.items():
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not is_number or not 0 <= weight < math.inf:
            raise ValueError(f"module_weights[{key!r}]={weight!r} is not allowed; it is a finite number, at least 0.")
    return chosen


def layer_number(module: str) -> int | None:
    """The first number in a module's name: 3 of "model.layers.3.self_attn.q_proj"; None without one."""
    return next((int(part) for part in module.split(".") if part.isdecimal()), None)


def common_shapes(adapters: Mapping[str, Adapter], choice: ModuleChoice) -> frozenset[ModuleShape]:
    """All (module, I, O) that count, having checked that every adapter shares one with another.

    Raises:
        ValueError: an adapter has none, or none that another adapter has in the same shape.
    """
    shapes = {name: choice.shapes(adapter) for name, adapter in adapters.items()}
    counts = Counter(shape for found in shapes.values() for shape in found)
    for name, found in shapes.items():
        if not found:
            raise ValueError(
                f"adapter {name!r} has none of the modules that layers, modules and module_weights leave."
            )
        if len(shapes) > 1 and all(counts[shape] == 1 for shape in found):
            module, width, height = min(found)
            raise ValueError(
                f"adapter {name!r} has no module in common with any other adapter, in name and shape, so there is "
                f"nothing to compare; its first is {module} ({height} x {width})."
            )
    return frozenset(counts)


def _fits(name: str, module: str) -> bool:
    return module == name or module.endswith(f".{name}")
