"""A linear module with experts: the base's output plus the routed low-rank updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn

from ..ops import ExpertBank, ExpertStack
from ..routers import Router
from .bank import BANKS, FactorStacks, add_bank, bank_fields, bank_modules
from .hot_set import HotSet
from .layouts import LayerExperts
from .paged_layer import PagedLayerMixin
from .prototype_state import PrototypeState
from .prototypes import STORED, PrototypeLinear, PrototypeMixin
from .requests import RequestTracker
from .routing import RoutingMixin
from .scaling import ScalingMixin
from .shared_input import SharedInput
from .tripwire import trip_on_backward


# What stays float32 whatever the base is.
FLOAT32 = ("arrow_lora_router", *(f"arrow_lora_{name}" for name in STORED))


def _never_merged(*_: Any) -> None:
    raise NotImplementedError("A routed layer is never merged into its base layer.")


class ArrowLoraLayer(ScalingMixin, BaseTunerLayer):
    """The experts of one layer, for each PEFT adapter (a PEFT adapter is one library of experts).

    `arrow_lora_A[adapter]` and `arrow_lora_B[adapter]` hold the factors of the experts that train when the model does,
    concatenated along the rank; `arrow_lora_frozen_A/B[adapter]` those that never train; `arrow_lora_router[adapter]`
    the prototypes, float32 (E, I).
    """

    adapter_layer_names = ("arrow_lora_A", "arrow_lora_B")
    other_param_names = (
        "arrow_lora_frozen_A",
        "arrow_lora_frozen_B",
        "arrow_lora_router",
        "arrow_lora_centroid",
        "arrow_lora_phatgoose",
        "arrow_lora_calibration",
        "experts",
        "routers",
        "aggregations",
        "kernels",
        "scales",
        "prototype_states",
        "prototype_updates",
        "columns",
        "kept_frozen",
        "tied",
        "masked",
        "cores",
        "shared",
        "pages",
    )

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.arrow_lora_A = nn.ModuleDict()
        self.arrow_lora_B = nn.ModuleDict()
        self.arrow_lora_frozen_A = nn.ModuleDict()
        self.arrow_lora_frozen_B = nn.ModuleDict()
        self.arrow_lora_router = nn.ModuleDict()
        for name in STORED:
            setattr(self, f"arrow_lora_{name}", nn.ModuleDict())
        self.experts: dict[str, LayerExperts] = {}
        self.routers: dict[str, Router] = {}
        self.aggregations: dict[str, str] = {}
        self.kernels: dict[str, str] = {}
        self.scales: dict[str, float] = {}
        self.prototype_states: dict[str, PrototypeState] = {}
        self.prototype_updates: dict[str, str] = {}
        self.columns: dict[str, dict] = {}
        self.kept_frozen: dict[str, bool] = {}
        self.tied: dict[str, tuple[ArrowLoraLayer, ...]] = {}
        self.masked: dict[str, frozenset[int]] = {}
        self.cores: dict[str, dict] = {}
        self.shared: dict[str, SharedInput] = {}
        self.pages: dict[str, HotSet] = {}
        self.module_name = ""
        self.requests: RequestTracker | None = None
        self.recorder: Callable | None = None
        self.gating: Callable | None = None
        self.inference_owner: Callable | None = None
        self.merged_adapters: list[str] = []
        # PEFT wants a way to quantise merged weights again, which a base quantised by hand lacks; nothing is merged
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass") or _never_merged
        )
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())

    def update_layer(
        self,
        adapter_name: str,
        experts: LayerExperts,
        router: Router,
        *,
        aggregation: str = "output",
        kernel: str = "auto",
        prototype_update: str = "step",
        stacks: FactorStacks | None = None,
        init_weights: bool | None = None,
        inference_mode: bool = False,
        keep_frozen: bool = False,
        stored: Sequence[str] = (),
    ) -> None:
        """Add an adapter's experts to this layer, or replace them.

        Args:
            adapter_name (`str`): the PEFT adapter.
            experts (`LayerExperts`): the experts that have this module.
            router (`Router`): shared by all layers of the adapter.
            aggregation, kernel, prototype_update (`str`): see `ArrowLoraConfig` and `KERNELS`.
            stacks (`FactorStacks`, *optional*): the experts' factors, which become the layer's parameters.
            init_weights (`bool`, *optional*):
                Without `stacks`: True starts B at zero, False at random, None leaves zeros that a checkpoint will
                replace.
            inference_mode (`bool`): whether the adapter is frozen.
            keep_frozen (`bool`): whether it stays so whatever is activated: experts that must not train are among it.
            stored (`Sequence[str]`): of `STORED`, what routers keep for this layer.
        """
        if aggregation == "parameter" and len(set(experts.ranks)) > 1:
            raise ValueError(
                f"aggregation='parameter' needs one rank per module, but experts here have ranks "
                f"{sorted(set(experts.ranks))}; use aggregation='output'."
            )
        self.experts[adapter_name] = experts
        self.routers[adapter_name] = router
        self.aggregations[adapter_name] = aggregation
        self.kernels[adapter_name] = kernel
        self.prototype_updates[adapter_name] = prototype_update
        self.scales.setdefault(adapter_name, 1.0)
        self.follow_store(adapter_name, stacks, keep_frozen)
        self.prototype_states[adapter_name] = PrototypeState()
        self.forget_plans()
        for is_main in (True, False):
            add_bank(self, adapter_name, experts, is_main, stacks, init_weights)
        self._make_rows(adapter_name, stored, has_weights=stacks is not None)
        self._move_adapter_to_device_of_base_layer(adapter_name, cast=stacks is None)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _make_rows(self, adapter_name: str, stored: Sequence[str], has_weights: bool) -> None:
        """Room for prototypes and for what routers keep, none of it filled."""
        self.cores[adapter_name] = {}
        self.arrow_lora_router[adapter_name] = PrototypeLinear(
            self.in_features, len(self.experts[adapter_name].positions), has_weights
        )
        for name in STORED:
            if adapter_name in self.stored_rows(name):
                del self.stored_rows(name)[adapter_name]
        for name in stored:
            self.make_stored(name, adapter_name)

    def stored_rows(self, name: str) -> nn.ModuleDict:
        """What a router keeps for this layer: PEFT adapter -> a linear map with one row an expert."""
        return getattr(self, f"arrow_lora_{name}")

    def make_stored(self, name: str, adapter_name: str) -> PrototypeLinear:
        """Make room for what a router keeps, without values; calibration is a mean and a spread an expert."""
        width = 2 if name == "calibration" else self.in_features
        made = PrototypeLinear(width, len(self.experts[adapter_name].positions))
        if made.weight.device.type != "meta":
            made = made.to(self.arrow_lora_router[adapter_name].weight.device)
        self.stored_rows(name)[adapter_name] = made
        return made

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None, cast: bool = False
    ) -> None:
        """Move one adapter to the base layer's device, with `cast` its factors also to the base layer's dtype."""
        base_device, base_dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        device = device or base_device
        castable = cast and base_dtype is not None and base_dtype.is_floating_point
        for name in (*BANKS[True], *BANKS[False], *FLOAT32):
            container = getattr(self, name)
            if adapter_name not in container or device is None or device.type == "meta":
                continue
            module = container[adapter_name]
            if module.weight.device.type != "meta":
                module.to(device=device, dtype=base_dtype if castable and name not in FLOAT32 else None)
        self.columns[adapter_name] = {}
        if device is not None and device.type != "meta":
            self._columns(adapter_name, device)

    def _freeze_non_trainable_peft_weights(self, adapter_names=None) -> None:
        for name in (*BANKS[False], *FLOAT32):
            getattr(self, name).requires_grad_(False)
        for adapter_name, is_kept in self.kept_frozen.items():
            for container in (self.arrow_lora_A, self.arrow_lora_B):
                if is_kept and adapter_name in container:
                    container[adapter_name].requires_grad_(False)

    def _columns(self, adapter_name: str, device: torch.device) -> tuple:
        """What does not change between forwards of each bank that has experts, kept per device."""
        by_device = self.columns[adapter_name]
        if device not in by_device:
            by_device[device] = bank_fields(self.experts[adapter_name], self.scales[adapter_name], device)
        return by_device[device]

    def stack(self, adapter_name: str, device: torch.device) -> ExpertStack:
        """The adapter's experts as kernels take them."""
        banks = tuple(
            ExpertBank(*bank_modules(self, adapter_name, is_main), **fields)
            for is_main, fields in self._columns(adapter_name, device)
        )
        return ExpertStack(banks, len(self.experts[adapter_name].positions), self.out_features, self.training)


class ArrowLoraLinear(PagedLayerMixin, RoutingMixin, PrototypeMixin, nn.Module, ArrowLoraLayer):
    """Routed LoRA on a linear module: `nn.Linear`, transformers' `Conv1D`, or a quantised one."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        ArrowLoraLayer.__init__(
            self, base_layer, get_apply_tensor_subclass=kwargs.pop("get_apply_tensor_subclass", None)
        )
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, **kwargs)
        self.register_load_state_dict_post_hook(_trust_loaded)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Base output plus the routed update, in the dtype of the base output; x is (..., I)."""
        row_targets, pins = kwargs.pop("row_targets", None), kwargs.pop("pins", None)
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or (self.requests is not None and self.requests.is_bare):
            return result
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        dtype = result.dtype
        if row_targets is not None:
            return self._mixed_batch(x, result, row_targets).to(dtype)
        for adapter_name in self.active_adapters:
            if adapter_name in self.experts:
                shared = self.shared.get(adapter_name) if pins is None else None
                added = None if shared is None else shared.add(self, x, result)
                result = result + self.routed_delta(adapter_name, x, pins) if added is None else added
        if self.inference_owner is not None and self.training and torch.is_grad_enabled():
            result = trip_on_backward(result, self.inference_owner)
        return result.to(dtype)

    def routed_delta(
        self, adapter_name: str, x: torch.Tensor, pins: Sequence[Mapping[int, float]] | None = None
    ) -> torch.Tensor:
        """The weighted expert outputs, (..., O).

        Args:
            adapter_name (`str`): the PEFT adapter.
            x (`torch.Tensor`): layer inputs (..., I).
            pins (`Sequence[Mapping[int, float]]`, *optional*):
                Send row b of the batch to these experts (position in the model -> weight) instead of routing.
        """
        routing = self.route(adapter_name, x) if pins is None else self.pinned(adapter_name, x, pins)
        if self.recorder is not None:
            self.recorder(self, adapter_name, routing, x.shape[:-1])
        merged = self.merged_rows(adapter_name, x) if pins is None else None
        if merged is not None:
            return merged.delta(self._cast_input_dtype(x, merged.lora_A.dtype))
        x_TI = x.reshape(-1, x.shape[-1])
        weights_TK = routing.top_k_weights
        if self.gating is not None:
            weights_TK = self.gating(self, x_TI, weights_TK)
        y_TO = self.apply_experts(adapter_name, x_TI, routing.top_k_index, weights_TK)
        return y_TO.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """The quantisation backend, as PEFT's own layers show it."""
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "arrow_lora." + super().__repr__()


def _trust_loaded(layer: ArrowLoraLinear, _incompatible_keys) -> None:
    layer.trust_stored_prototypes()
