"""A library in a base, set up for one method after the other; the base is as before when it is closed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any

import torch
from peft import PeftModel

from ..library.library import AdapterLibrary
from ..routers import ROUTERS, SELECTION_FIELDS
from ..tuner import ArrowLoraConfig, ArrowLoraModel
from .batches import Around, nothing_around
from .methods import Method


# What `Selection` calls otherwise than the config.
RENAMED = {"temperature": "router_temperature"}


def routing_defaults(top_k: int) -> dict[str, Any]:
    """The common options of routers with their defaults, and `top_k`."""
    defaults = {field.name: field.default for field in fields(ArrowLoraConfig)}
    names = [RENAMED.get(name, name) for name in SELECTION_FIELDS]
    return {**{name: defaults[name] for name in names}, "top_k": top_k}


class RoutedLibrary:
    """A base with a library in it.

    Args:
        base (`torch.nn.Module`): the base model; it is changed in place until `close`.
        library (`AdapterLibrary`): the experts.
        top_k (`int`): experts a token, where a method says nothing else.
        lora_seed (`int`, *optional*): of random LoRAs that stand for the experts.
    """

    nothing = staticmethod(nothing_around)

    def __init__(
        self, base: torch.nn.Module, library: AdapterLibrary, top_k: int, lora_seed: int | None = None
    ) -> None:
        self.lora_seed = lora_seed
        self.defaults = routing_defaults(top_k)
        self.model: PeftModel = ArrowLoraModel.from_pretrained(base, library, top_k=top_k)
        self.fitted: set[str] = set()
        self.calibrated: tuple[str, dict[str, Any]] | None = None  # the router, and its own options

    def close(self) -> None:
        """Give the base back as it was."""
        self.model.unload()

    def base(self, rows: int) -> AbstractContextManager:
        """The base alone is called while this is open."""
        return self.model.disable_adapter()

    def pinned(self, experts: Any) -> Around:
        """Every token goes to these experts while what this returns is open; as an entry of `pin_experts`."""
        self._aggregate("output", "pinned experts")
        return lambda rows: self.model.pin_experts([experts] * rows)

    def use(
        self, method: Method, seed: int | None, fit_data: Mapping[str, Iterable[Any]] | None, tokenizer: Any
    ) -> None:
        """Route as a method says, with nothing left of the one before.

        Raises:
            ValueError: the method needs equal ranks, or an option that its router does not have.
        """
        self._aggregate(method.aggregation, f"method {method.name!r}")
        if method.needs_data and method.router not in self.fitted:
            self.model.fit_router(method.router, fit_data, tokenizer=tokenizer)
            self.fitted.add(method.router)
        options = resolved_options(method, seed, self.defaults)
        scores = method.router, {name: options[name] for name in ROUTERS[method.router].options}
        is_measured = scores == self.calibrated  # how many are chosen, and how they are joined, is not in the scores
        self.model.set_router(method.router, **{**options, "calibrated": options["calibrated"] and is_measured})
        if options["calibrated"] and not is_measured:
            self.model.calibrate_router()
            self.calibrated = scores

    def _aggregate(self, aggregation: str, who: str) -> None:
        adapter = self.model.base_model.active_arrow_adapter()
        for name, layer in self.model.base_model.routed_layers().items():
            ranks = sorted(set(layer.experts[adapter].ranks))
            if aggregation == "parameter" and len(ranks) > 1:
                raise ValueError(
                    f"{who} averages A and B, so it needs one rank a module; the experts of "
                    f"{name} have the ranks {ranks}."
                )
            layer.aggregations[adapter] = aggregation


def resolved_options(method: Method, seed: int | None, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a method's router: those it names, the defaults of the others, and the seed of the run."""
    own = {name: option.default for name, option in ROUTERS[method.router].options.items()}
    return {**defaults, **own, **method.options, **({} if seed is None or method.kind != "routed" else {"seed": seed})}
