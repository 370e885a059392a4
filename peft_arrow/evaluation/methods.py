"""The ways to use a library that are compared: what was asked for, and the controls beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..routers import ROUTERS


SPECIAL = {
    "base": "the base model without adapters",
    "uniform_parameter": "the mean of all A times the mean of all B (arXiv 2405.11157's uniform routing)",
    "best_single": "one expert for everything, chosen on the rows for selection",
    "oracle": "each task with its own expert: it is told the task",
    "random_lora": "Arrow over random LoRAs of the same shapes and norms as the experts",
}
TOLD = {
    "uniform": "all experts with the same weight",
    "random": "experts chosen and weighted at random for each token and module",
    "arrow": "Arrow routing between the experts",
}
CONTROLS = ("base", "uniform", "random", "random_lora", "best_single", "oracle")
LAST = ("best_single", "oracle")
NOT_OPTIONS = ("router", "name", "experts", "aggregation")


@dataclass(frozen=True)
class Method:
    """One way to use a library.

    Args:
        name (`str`): in tables and files.
        kind (`str`): `"base"`, `"pinned"` (to `experts`), `"best_single"`, `"oracle"`, `"routed"`, or `"random_lora"`.
        router (`str`, *optional*): a key of `ROUTERS`, of a routed one.
        options (`Mapping`): of `set_router`.
        aggregation (`str`): `"output"` or `"parameter"`.
        experts: of a pinned one, as an entry of `pin_experts`.
        seeds (`tuple`): one run for each; None where nothing is random.
    """

    name: str
    kind: str
    router: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    aggregation: str = "output"
    experts: Any = None
    seeds: tuple[int | None, ...] = (None,)

    @property
    def needs_data(self) -> bool:
        """Whether its router has to be fitted first."""
        return self.router is not None and ROUTERS[self.router].needs_data

    def told(self) -> str:
        """What it is, for people."""
        if self.kind == "pinned":
            return f"every token to {self.experts!r}"
        words = TOLD.get(self.name) or SPECIAL.get(self.name)
        if words is None:
            summary = ROUTERS[self.router].summary if self.router else ""
            words = f"router {self.router!r}" + (f": {summary}" if summary else "")
        chosen = ", ".join(f"{name}={value!r}" for name, value in self.options.items() if name != "seed")
        return f"{words} ({chosen})" if chosen else words


def list_methods(
    methods: Sequence[str | Mapping[str, Any]], *, controls: bool = True, seeds: int = 3, lora_seeds: int = 1
) -> list[Method]:
    """The methods that were asked for and the controls, in the order of the tables.

    Args:
        methods (`Sequence`): names of routers and of `SPECIAL`; or dicts with `router` and any option of `set_router`,
            or with `experts` (a name, a list of names, or a dict of weights), and `name`, `aggregation`.
        controls (`bool`): add `CONTROLS`.
        seeds (`int`): runs of random routing.
        lora_seeds (`int`): runs of random LoRAs.

    Raises:
        ValueError: an unknown method, a name twice, or a dict without `router` and `experts`.
    """
    if isinstance(methods, (str, Mapping)):
        methods = [methods]
    asked = [_method(entry, seeds, lora_seeds) for entry in methods]
    names = [method.name for method in asked]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise ValueError(f"methods holds {double[0]!r} twice; give one of them another 'name'.")
    added = [_method(name, seeds, lora_seeds) for name in CONTROLS if controls and name not in names]
    every = {method.name: method for method in [*added, *asked]}
    if not every:
        raise ValueError("methods is empty, and controls=False; at least one is needed.")
    first = [name for name in CONTROLS if name in every and name not in LAST]
    rest = [name for name in every if name not in CONTROLS]
    return [every[name] for name in [*first, *rest, *(name for name in LAST if name in every)]]


def _method(entry: str | Mapping[str, Any], seeds: int, lora_seeds: int) -> Method:
    if isinstance(entry, str):
        return _named(entry, seeds, lora_seeds)
    if not isinstance(entry, Mapping) or ("router" in entry) == ("experts" in entry):
        raise ValueError(f"methods holds {entry!r}; allowed are names, and dicts with either 'router' or 'experts'.")
    if "experts" in entry:
        given = sorted(set(entry) - {"experts", "name"})
        if given:
            raise ValueError(f"methods holds {dict(entry)!r}; 'experts' goes with 'name' only, not with {given[0]!r}.")
        experts = entry["experts"]
        name = entry.get("name") or (experts if isinstance(experts, str) else "+".join(experts))
        return Method(_checked_name(name), "pinned", experts=experts)
    router = entry["router"]
    _check_router(router)
    options = {name: value for name, value in entry.items() if name not in NOT_OPTIONS}
    name = entry.get("name") or "_".join([router, *(f"{key}={value}" for key, value in options.items())])
    aggregation = entry.get("aggregation", "output")
    runs = tuple(range(seeds)) if router == "random" and "seed" not in options else (None,)
    return Method(_checked_name(name), "routed", router, options, aggregation, seeds=runs)


def _named(name: str, seeds: int, lora_seeds: int) -> Method:
    if name == "uniform_parameter":
        return Method(name, "routed", "uniform", aggregation="parameter")
    if name == "random_lora":
        return Method(name, "random_lora", "arrow", seeds=tuple(range(lora_seeds)))
    if name in SPECIAL:
        return Method(name, name)
    _check_router(name)
    return Method(name, "routed", name, seeds=tuple(range(seeds)) if name == "random" else (None,))


def _check_router(name: Any) -> None:
    if name not in ROUTERS or ROUTERS[name].is_pinned:
        allowed = [
            *SPECIAL,
            *(key for key in ROUTERS if not ROUTERS[key].is_pinned and key not in SPECIAL),
        ]
        raise ValueError(f"methods holds {name!r}, which is unknown; allowed are {', '.join(map(repr, allowed))}.")


def _checked_name(name: str) -> str:
    if not name or "/" in name or name in SPECIAL:
        raise ValueError(f"methods holds the name {name!r}; a name has no '/' and is none of {list(SPECIAL)}.")
    return name
