"""Which experts have which module, and how: the part of a config that rebuilds a model without the original adapters.

A layout is a JSON object `{"modules": [...], "rank": 8, "scaling": 2.0, "dropout": 0.0}`; `rank` and `scaling` are
lists where modules differ; `modules` is null for fresh experts, which have every targeted module. Experts of one shape
share a layout, so that a thousand alike cost a thousand integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any


@dataclass(frozen=True)
class LayerExperts:
    """The experts of one layer, in routing order.

    Args:
        positions (`tuple[int, ...]`): position of each in the model's `expert_names`.
        ranks, scalings, dropouts: of each, see `ExpertBank`.
        trainable (`tuple[bool, ...]`): whether the expert lies in the main bank (trained when the model is) or in the
            frozen bank.
    """

    positions: tuple[int, ...]
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    dropouts: tuple[float, ...]
    trainable: tuple[bool, ...]

    def bank(self, trainable: bool) -> tuple[int, ...]:
        """Positions in this layer of the experts of the main (`True`) or the frozen (`False`) bank."""
        return self._banks[trainable]

    def bank_rank(self, trainable: bool) -> int:
        """Sum of the ranks of a bank."""
        return sum(self.ranks[e] for e in self.bank(trainable))

    @cached_property
    def _banks(self) -> dict[bool, tuple[int, ...]]:
        return {
            bank: tuple(e for e, in_main in enumerate(self.trainable) if in_main == bank) for bank in (True, False)
        }

    @cached_property
    def slots(self) -> dict[int, tuple[bool, slice]]:
        """Each expert's bank (as in `bank`) and where in it its ranks lie, by position in the whole model."""
        ends = {True: 0, False: 0}
        found = {}
        for position, rank, in_main in zip(self.positions, self.ranks, self.trainable, strict=True):
            found[position] = (in_main, slice(ends[in_main], ends[in_main] + rank))
            ends[in_main] += rank
        return found


def make_layout(ranks: dict[str, int], scalings: dict[str, float], dropout: float) -> dict[str, Any]:
    """The layout of an expert with these modules (names in sorted order)."""
    modules = sorted(ranks)
    return {
        "modules": modules,
        "rank": _compress([ranks[module] for module in modules]),
        "scaling": _compress([scalings[module] for module in modules]),
        "dropout": dropout,
    }


def fresh_layout(rank: int, scaling: float, dropout: float) -> dict[str, Any]:
    """The layout of an expert that has every targeted module."""
    return {"modules": None, "rank": rank, "scaling": scaling, "dropout": dropout}


def _compress(values: list) -> Any:
    return values[0] if len(set(values)) == 1 else values


def _expand(value: Any, count: int) -> list:
    return value if isinstance(value, list) else [value] * count


def layout_table(layout: dict[str, Any]) -> dict[str, tuple[int, float]] | None:
    """module -> (rank, scaling); None for a fresh layout."""
    modules = layout["modules"]
    if modules is None:
        return None
    return dict(
        zip(
            modules,
            zip(_expand(layout["rank"], len(modules)), _expand(layout["scaling"], len(modules)), strict=True),
            strict=True,
        )
    )


class LayoutIndex:
    """Look-up of the experts of a module, built once per config."""

    def __init__(self, layouts: list[dict[str, Any]], expert_layouts: list[int], trainable: list[bool]) -> None:
        self.layouts = layouts
        self.tables = [layout_table(layout) for layout in layouts]
        self.expert_layouts = expert_layouts
        self.trainable = trainable
        self.modules = {module for table in self.tables if table is not None for module in table}
        self.has_fresh = any(self.tables[layout] is None for layout in expert_layouts)
        self._by_layouts = lru_cache(maxsize=None)(self._experts)

    def experts(self, module: str, is_targeted: bool = True) -> LayerExperts | None:
        """The experts that have the module, or None.

        Args:
            module (`str`): the base's name of the module.
            is_targeted (`bool`): whether the config's `target_modules` match it, so that fresh experts have it.
        """
        entries = tuple(
            ((layout["rank"], layout["scaling"]) if is_targeted else None) if table is None else table.get(module)
            for layout, table in zip(self.layouts, self.tables, strict=True)
        )
        return self._by_layouts(entries)

    def _experts(self, entries: tuple) -> LayerExperts | None:
        rows = [
            (position, *entries[layout], self.layouts[layout]["dropout"], self.trainable[position])
            for position, layout in enumerate(self.expert_layouts)
            if entries[layout] is not None
        ]
        return LayerExperts(*map(tuple, zip(*rows, strict=True))) if rows else None
