"""The part of a config that says how to route, and whether what that needs is there."""

from __future__ import annotations

import copy
from numbers import Integral, Real
from typing import Any, Self

from ..routers import ROUTERS, SELECTION_FIELDS, Router, Selection, check_router, make_router


class RouterSettings:
    """Methods of `ArrowLoraConfig` that are about routers."""

    def make_router(self) -> Router:
        """The router with its settings.

        Raises:
            ValueError: a name, an option or a value is not allowed.
        """
        check_router(self.router)
        values = {name: getattr(self, name) for name in SELECTION_FIELDS if name != "temperature"}
        masked = self.masked_experts or ()
        values["masked_experts"] = masked if isinstance(masked, str) else tuple(masked)
        selection = Selection(temperature=self.router_temperature, **values)
        return make_router(self.router, selection, **(self.router_options or {}))

    def check_ready(self) -> None:
        """Raise a `ValueError` unless what the router needs is stored, for these experts."""
        unknown = [name for name in self.masked_experts or () if name not in self.expert_names]
        if unknown:
            raise ValueError(f"masked_experts holds {unknown[0]!r}; experts are {self.expert_names}.")
        if (
            self.masked_experts
            and len(set(self.masked_experts)) == len(self.expert_names)
            and self.null_expert is None
        ):
            raise ValueError(f"masked_experts={self.masked_experts} leaves no expert to choose.")
        router = self.make_router()
        if router.needs_data:
            self._check_stored(self.router, (self.fitted or {}).get(self.router), "fit_router")
        if self.calibrated:
            self._check_stored(self.router, self.calibration, "calibrate_router")
            for name, now in (("router", self.router), ("router_options", router.chosen)):
                if self.calibration[name] != now:
                    raise ValueError(
                        f"calibrated=True with {name}={now!r}, but the stored calibration is of "
                        f"{self.calibration[name]!r}; call model.calibrate_router() with the router set."
                    )

    def _check_stored(self, router: str, stored: dict | None, method: str) -> None:
        told = f"{router!r}, datasets" if method == "fit_router" else ""
        if stored is None:
            raise ValueError(
                f"router={router!r} needs what model.{method}({told}) stores, and there is none; make the model with "
                "another router, and call it."
            )
        if stored["experts"] != self.expert_names:
            raise ValueError(
                f"router={router!r}: {method} was called for the experts {stored['experts']}, and now they are "
                f"{self.expert_names}; call model.{method}({told}) again."
            )

    def stored(self) -> list[str]:
        """What routers keep for each layer, beside the prototypes."""
        rows = [name for name in self.fitted or {} if ROUTERS[name].stores_rows]
        return rows + (["calibration"] if self.calibration else [])

    def changed(self, **values: Any) -> Self:
        """A copy with other values, checked; what the model keeps on the config beside its fields is kept."""
        draft = copy.copy(self)
        for name, value in values.items():
            setattr(draft, name, value)
        draft.top_k, draft.router_temperature = plain(draft.top_k), plain(draft.router_temperature)
        draft.make_router()
        return draft


def plain(value: Any) -> Any:
    """numpy's and other libraries' numbers as Python's, for JSON; anything else as it is, to be refused."""
    if isinstance(value, bool):
        return value
    return int(value) if isinstance(value, Integral) else float(value) if isinstance(value, Real) else value
