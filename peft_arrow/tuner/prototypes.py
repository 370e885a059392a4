"""Building prototypes lazily and using them in float32."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..ops import is_materialised
from ..routers import top_right_singular_vectors
from .bank import BANKS, bank_modules
from .prototype_state import (
    BUILD_LOCK,
    built_layers,
    fingerprint,
    is_building_suspended,
    is_distributed,
    is_sharded,
    whole,
)


# What routers keep for a layer beside the prototypes.
STORED = ("centroid", "phatgoose", "calibration")


class PrototypeLinear(nn.Linear):
    """The prototypes of a layer, float32 (E, I), frozen; calling it gives the dot product of each input with each.

    A module, so that offloading and FSDP hooks give it its weight; a parameter and no buffer, because TRL copies
    parameters for its reference adapter and DDP would broadcast a buffer at every step. A row of NaN is not built yet.
    """

    def __init__(self, in_features: int, num_experts: int, has_weights: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, num_experts
        weight = nn.Parameter(torch.full((num_experts, in_features), float("nan")), requires_grad=False)
        self.register_parameter("weight", weight)
        if has_weights:  # beside real factors the prototypes are real too, also under `low_cpu_mem_usage=True`
            self._parameters["weight"] = weight
        self.register_parameter("bias", None)

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        """(T, I) in any floating dtype -> float32 (T, E)."""
        return dot_float32(x_TI, self.weight)


def dot_float32(x_TI: torch.Tensor, prototypes_EI: torch.Tensor) -> torch.Tensor:
    """x_TI @ prototypes_EI^T in float32, whatever the dtypes and autocast."""
    with torch.autocast(x_TI.device.type, enabled=False):
        return nn.functional.linear(x_TI.float(), prototypes_EI.float())


class PrototypeMixin:
    """The part of a layer that keeps its prototypes in step with its experts."""

    def project(self, adapter_name: str, x_TI: torch.Tensor) -> torch.Tensor:
        """Dot products of the inputs with the prototypes, float32 (T, E)."""
        local_EI = self.prototype_states[adapter_name].local
        return self.arrow_lora_router[adapter_name](x_TI) if local_EI is None else dot_float32(x_TI, local_EI)

    def _bank_weights(self, adapter_name: str) -> dict[bool, list[torch.Tensor]]:
        experts = self.experts[adapter_name]
        return {
            is_main: [module.weight for module in bank_modules(self, adapter_name, is_main)]
            for is_main in (True, False)
            if experts.bank(is_main)
        }

    def stale_experts(self, adapter_name: str) -> list[int]:
        """Positions in the layer of the experts whose prototypes must be (re)built; empty for a clean layer."""
        state, experts = self.prototype_states[adapter_name], self.experts[adapter_name]
        weights = self._bank_weights(adapter_name)
        stale: set[int] = set()
        if set(state.fingerprints) != set(weights):
            stale.update(
                torch.isnan(whole(self.arrow_lora_router[adapter_name].weight)[:, 0]).nonzero().flatten().tolist()
            )
            return sorted(stale)
        for is_main, known in state.fingerprints.items():
            if known != fingerprint(weights[is_main]) and self.prototype_updates[adapter_name] == "step":
                stale.update(experts.bank(is_main))
        return sorted(stale)

    def _weights_now(self, adapter_name: str) -> dict[bool, tuple]:
        """A fingerprint of each bank's weights."""
        return {bank: fingerprint(w) for bank, w in self._bank_weights(adapter_name).items()}

    def _remember(self, adapter_name: str) -> None:
        self.prototype_states[adapter_name].remember(self._weights_now(adapter_name))
        built_layers.add(self)

    def is_clean(self, adapter_name: str) -> bool:
        """Whether the prototypes are known to belong to the current weights, without reading a tensor."""
        known = self.prototype_states[adapter_name].fingerprints
        if not known:
            return False
        if self.prototype_updates[adapter_name] == "frozen":
            return True
        return all(known[bank] == fingerprint(w) for bank, w in self._bank_weights(adapter_name).items())

    def check_prototypes(self, adapter_name: str) -> None:
        """Make sure that the prototypes are those of the current weights, building what is stale.

        Raises:
            RuntimeError: something is stale while the model is being compiled or exported.
        """
        if torch.compiler.is_compiling():
            if not self.prototype_states[adapter_name].is_built:
                raise RuntimeError(
                    "The prototypes of this ArrowLoraModel are not built, and they cannot be while it is compiled or "
                    "exported; call model.build_prototypes() first."
                )
            self.prototype_states[adapter_name].is_compiled = True
            return
        if not self.is_clean(adapter_name):
            self.build_prototypes([adapter_name], gather=True)
            if not self.prototype_states[adapter_name].fingerprints:
                raise RuntimeError(
                    "The prototypes of this ArrowLoraModel are not built, and they cannot be while its weights are "
                    "offloaded; call model.build_prototypes() before offloading."
                )

    def build_prototypes(
        self, adapter_names: Iterable[str] | None = None, rebuild: bool = False, gather: bool = False
    ) -> None:
        """Build the stale prototypes, or with `rebuild` all of them. Thread-safe; draws no random number.

        With `gather`, also where the factors themselves are sharded: for a forward, in which all processes take part.
        """
        for adapter_name in list(self.experts) if adapter_names is None else adapter_names:
            is_inference = self.arrow_lora_router[adapter_name].weight.is_inference()
            with BUILD_LOCK, torch.inference_mode(is_inference), torch.no_grad():
                if rebuild or not self.is_clean(adapter_name):
                    self._build(adapter_name, rebuild, gather)

    def _build(self, adapter_name: str, rebuild: bool, gather: bool) -> None:
        experts, router = self.experts[adapter_name], self.arrow_lora_router[adapter_name]
        weights = [w for bank in self._bank_weights(adapter_name).values() for w in bank]
        if not is_materialised(*(w for w in (router.weight, *weights) if not (gather and is_sharded(w)))):
            return
        stale = list(range(len(experts.positions))) if rebuild else self.stale_experts(adapter_name)
        if stale:
            factors = self.expert_factors(adapter_name)
            # paged experts may rest elsewhere
            halves = [[factors[e][half].to(router.weight.device) for e in stale] for half in (0, 1)]
            rows = top_right_singular_vectors(*halves)
            state = self.prototype_states[adapter_name]
            if is_distributed():
                known = whole(router.weight.detach()) if state.local is None else state.local
                state.local = known.float().index_copy(0, torch.tensor(stale, device=rows.device), rows)
            if not is_sharded(router.weight):
                router.weight[stale] = rows.to(router.weight)
        self._remember(adapter_name)

    def expert_factors(self, adapter_name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(A (r, I), B (O, r)) of each expert of the layer, views into the banks."""
        experts = self.experts[adapter_name]
        factors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for is_main, (lora_A, lora_B) in self._bank_weights(adapter_name).items():
            lora_A, lora_B = whole(lora_A), whole(lora_B)
            members = experts.bank(is_main)
            ranks = [experts.ranks[e] for e in members]
            factors.update(
                zip(members, zip(lora_A.split(ranks, dim=0), lora_B.split(ranks, dim=1), strict=True), strict=True)
            )
        return [factors[e] for e in range(len(experts.ranks))]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if not is_building_suspended():
            self.build_prototypes()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for adapter_name in self.experts:
            self._prepare_load(state_dict, prefix, adapter_name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _prepare_load(self, state_dict, prefix: str, adapter_name: str) -> None:
        """Loaded prototypes are taken as they are; where only factors are loaded, the prototypes are built anew."""
        banks = [name for pair in BANKS.values() for name in pair]
        has_factors = any(f"{prefix}{bank}.{adapter_name}.weight" in state_dict for bank in banks)
        has_prototypes = f"{prefix}arrow_lora_router.{adapter_name}.weight" in state_dict
        if has_factors and not has_prototypes:
            self.discard_prototypes(adapter_name)
        elif has_prototypes:
            self.prototype_states[adapter_name].forget()

    def discard_prototypes(self, adapter_name: str) -> None:
        """Mark all prototypes of the adapter as not built."""
        weight = self.arrow_lora_router[adapter_name].weight
        if weight.device.type != "meta":
            with torch.no_grad():
                weight.fill_(float("nan"))
        self.prototype_states[adapter_name].forget()

    def _apply(self, fn, recurse: bool = True):
        """A move keeps the prototypes; a change of dtype rounds the factors, so they are built anew, in float32."""
        clean = {name: self.is_clean(name) for name in self.experts}
        before = {name: self._dtypes(name) for name in self.experts}
        super()._apply(fn, recurse)
        self.columns = {name: {} for name in self.columns}
        self.forget_plans()
        for adapter_name in self.experts:
            self.cores[adapter_name] = {}
            for rows in (self.arrow_lora_router, *(self.stored_rows(name) for name in STORED)):
                if adapter_name in rows and rows[adapter_name].weight.dtype != torch.float32:
                    weight = rows[adapter_name].weight.detach().float()
                    rows[adapter_name].weight = nn.Parameter(weight, requires_grad=False)
            if self._dtypes(adapter_name) != before[adapter_name]:
                self.discard_prototypes(adapter_name)
            elif clean[adapter_name]:
                self.prototype_states[adapter_name].local = None
                self._remember(adapter_name)
            elif self.prototype_states[adapter_name].fingerprints:
                self.discard_prototypes(adapter_name)
        return self

    def __getstate__(self) -> dict:
        """Copies and pickles get prototypes of the weights that they get."""
        if not is_building_suspended():
            self.build_prototypes()
        return self.__dict__

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.trust_stored_prototypes()

    def trust_stored_prototypes(self) -> None:
        """Take complete prototypes that came with the weights (from a file, a copy) as those of these weights."""
        for adapter_name, state in self.prototype_states.items():
            weight = self.arrow_lora_router[adapter_name].weight
            if not state.fingerprints and is_materialised(weight) and not torch.isnan(weight[:, 0]).any():
                self._remember(adapter_name)

    def _dtypes(self, adapter_name: str) -> list[torch.dtype]:
        return [w.dtype for bank in self._bank_weights(adapter_name).values() for w in bank]
