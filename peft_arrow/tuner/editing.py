"""Adding, removing and exporting experts of a live model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import _get_submodules

from ..library.adapter import Adapter, AdapterLike, check_name, list_locations, load, unique_name
from ..library.base_modules import BaseModules, is_match
from ..library.lora import LoraContent
from .bank import FactorStacks, bank_shapes
from .config import ArrowLoraConfig
from .expert_store import ExpertStore, discarded_on_failure
from .export import export_lora
from .fitting import outline_on_base, read_on_base
from .heads import saved_modules
from .layer import ArrowLoraLayer
from .layouts import LayerExperts
from .resolve import add_layout, check_equal_ranks


@dataclass(frozen=True)
class LayerPlan:
    """The experts that one module is to have, with their factors and the prototypes that stay valid (NaN: none)."""

    experts: LayerExperts | None
    weights: list[tuple[torch.Tensor, torch.Tensor]]
    prototypes_EI: torch.Tensor | None


class EditingMixin:
    """Methods of `ArrowLoraModel` that change which experts there are."""

    def add_expert(self, ref: AdapterLike, name: str | None = None) -> None:
        """Add an adapter (or all of a library) to the active adapter's experts; nothing changes if it does not fit.

        An optimizer made before holds the old parameters: make a new one. In a model with `trainable_experts=[...]`
        the new expert is frozen.

        Args:
            ref: a reference as in `adapters`.
            name (`str`, *optional*): its name; derived from the reference otherwise.

        Raises:
            ValueError: the name is taken, or the adapter does not fit the base.
        """
        adapter_name = self.active_arrow_adapter()
        config = self.peft_config[adapter_name]
        if name is not None and check_name(name) in config.expert_names:
            raise ValueError(f"name={name!r} is already an expert; experts are {config.expert_names}.")
        located = list_locations([ref]) if name is None else list_locations({name: ref})
        draft = _draft(config)
        base = BaseModules(self.model)
        contents: dict[str, LoraContent] = {}
        for derived, place in located.items():
            unique = unique_name(derived, draft.expert_names)
            adapter = load(unique, place)
            outline_on_base(adapter, base)
            contents[unique] = read_on_base(adapter, base)
            self._check_heads(adapter_name, adapter, contents[unique])
            draft.expert_names.append(unique)
            add_layout(draft, contents[unique], place)
            if not draft.__dict__.get("_has_fresh") and isinstance(draft.target_modules, set):
                draft.target_modules = draft.target_modules | set(contents[unique].factors)
        self._apply_draft(adapter_name, draft, contents)

    def remove_expert(self, name: str) -> None:
        """Remove an expert of the active adapter.

        Raises:
            ValueError: there is no such expert, or it is the last one.
        """
        adapter_name = self.active_arrow_adapter()
        config = self.peft_config[adapter_name]
        if name not in config.expert_names:
            raise ValueError(f"name={name!r} is not an expert; experts are {config.expert_names}.")
        if len(config.expert_names) == 1:
            raise ValueError(
                f"name={name!r} is the last expert; delete_adapter({adapter_name!r}) removes the whole adapter."
            )
        draft = _draft(config)
        position = config.expert_names.index(name)
        for entries in (draft.expert_names, draft.expert_layouts, draft.expert_sources, draft.expert_licenses):
            del entries[position]
        if isinstance(draft.trainable_experts, list):
            draft.trainable_experts = [expert for expert in draft.trainable_experts if expert != name]
        self._apply_draft(adapter_name, draft, {})

    def export_lora(
        self,
        folder: str | PathLike,
        weights: str | dict[str, float] = "uniform",
        rank: int | None = None,
        method: str = "svd",
    ) -> dict[str, Any]:
        """Write one plain PEFT LoRA: the weighted mean of the experts' delta-W; see [`peft_arrow.tuner.export`]."""
        return export_lora(self, folder, weights=weights, rank=rank, method=method)

    def _check_heads(self, adapter_name: str, adapter: Adapter, content: LoraContent) -> None:
        if not content.saved or self.peft_config[adapter_name].modules_to_save_from is not None:
            return
        current = saved_modules(self.model, adapter_name)
        for key, tensor in content.saved.items():
            if key not in current or not torch.equal(current[key].detach().to(tensor), tensor):
                raise ValueError(
                    f"adapter {adapter.name!r} ({adapter.source}): it brings its own trained module {key!r}, and the "
                    "model has another one; build the model from all adapters with modules_to_save_from=<expert name>."
                )

    def _apply_draft(self, adapter_name: str, draft: ArrowLoraConfig, contents: dict[str, LoraContent]) -> None:
        """Plan every layer first, so that a failure changes nothing, then carry the plans out.

        What `fit_router` and `calibrate_router` stored was for the experts as they were, and goes.
        """
        draft.fitted = draft.calibration = None
        if draft.masked_experts:
            draft.masked_experts = [name for name in draft.masked_experts if name in draft.expert_names] or None
        draft.check_ready()
        if draft.aggregation == "parameter":
            check_equal_ranks(draft)
        index = draft.layout_index()
        draft._modules, draft._has_fresh = index.modules, index.has_fresh
        draft.num_experts = None if draft.num_experts is None else len(draft.expert_names)
        layers = self.routed_layers()
        like = next(layer for layer in layers.values() if adapter_name in layer.experts)
        options = {
            "router": like.routers[adapter_name],
            "kernel": like.kernels[adapter_name],
            "aggregation": draft.aggregation,
            "prototype_update": draft.prototype_update,
            "inference_mode": draft.inference_mode,
            "keep_frozen": draft.keeps_frozen(),
        }
        scale, factor = like.scales[adapter_name], like.expert_factors(adapter_name)[0][0]
        names = list(dict.fromkeys([*layers, *(module for c in contents.values() for module in c.factors)]))
        plans = {}
        for module in names:
            is_targeted = is_match(BaseTuner._check_target_module_exists(draft, module))
            experts = index.experts(module, is_targeted)
            plans[module] = self._plan(adapter_name, draft, module, layers.get(module), experts, contents, factor)
        store = self._store_for(adapter_name, plans)
        with discarded_on_failure(store):
            for module in names:
                self._carry_out(adapter_name, module, layers.get(module), plans.pop(module), options, scale, store)
            if store is not None:
                store.finish()
                self.drop_store(adapter_name)
                self.expert_stores[adapter_name] = store
        self._use_config(adapter_name, draft)

    def _store_for(self, adapter_name: str, plans: dict[str, LayerPlan]) -> ExpertStore | None:
        """Room for the frozen experts of all plans, where those of the adapter are paged."""
        if adapter_name not in self.expert_stores:
            return None
        is_main, shapes = self.peft_config[adapter_name].inference_mode, {}
        for module, plan in plans.items():
            banks = {} if plan.experts is None else bank_shapes(plan.experts, plan.weights)
            if is_main in banks:
                shapes[module, is_main] = banks[is_main]
        return ExpertStore(self.expert_stores[adapter_name].paging(), adapter_name, shapes)

    def _plan(self, adapter_name, draft, module, layer, experts, contents, like) -> LayerPlan:
        """What the module is to have; new factors get the dtype and device of those there, or of the tensor `like`."""
        if experts is None:
            return LayerPlan(None, [], None)
        config = self.peft_config[adapter_name]
        is_present = layer is not None and adapter_name in layer.experts
        old_positions = layer.experts[adapter_name].positions if is_present else ()
        factors = layer.expert_factors(adapter_name) if is_present else []
        rows_EI = layer.arrow_lora_router[adapter_name].weight.detach() if is_present else None
        stale = set(layer.stale_experts(adapter_name)) if is_present else set()
        like = factors[0][0] if factors else like
        device = like.device if rows_EI is None else rows_EI.device
        weights, prototypes = [], []
        for position in experts.positions:
            name = draft.expert_names[position]
            if name in contents:
                factor = contents[name].factors[module]
                weights.append((factor.lora_A.to(like), factor.lora_B.to(like)))
                prototypes.append(torch.full((factor.lora_A.shape[1],), float("nan"), device=device))
            else:
                old = old_positions.index(config.expert_names.index(name))
                weights.append(tuple(factor.detach() for factor in factors[old]))
                prototypes.append(rows_EI[old] * (float("nan") if old in stale else 1.0))
        return LayerPlan(experts, weights, torch.stack(prototypes))

    def _carry_out(self, adapter_name, module, layer, plan: LayerPlan, options, scale, store) -> None:
        if plan.experts is None:
            if layer is not None and adapter_name in layer.experts:
                self._drop_layer(adapter_name, module, layer)
            return
        lora_A, _ = plan.weights[0]
        stacks = FactorStacks(plan.experts, plan.weights, lora_A.device, store, module)
        for position, factors in zip(plan.experts.positions, plan.weights, strict=True):
            stacks.put(position, *factors)
        options = {**options, "experts": plan.experts, "stacks": stacks}
        if layer is None:
            parent, target, target_name = _get_submodules(self.model, module)
            layer = self._create_new_module(adapter_name, target, **options)
            self._replace_module(parent, target_name, layer, target)
            layer.train(self.training)
            self.targeted_module_names.append(module)
        else:
            layer.update_layer(adapter_name, **options)
        layer.set_scale(adapter_name, scale)
        with torch.no_grad():
            layer.arrow_lora_router[adapter_name].weight.copy_(plan.prototypes_EI)

    def _drop_layer(self, adapter_name: str, module: str, layer: ArrowLoraLayer) -> None:
        layer.delete_adapter(adapter_name)
        if not layer.experts:
            parent, target, target_name = _get_submodules(self.model, module)
            setattr(parent, target_name, target.base_layer)


def _draft(config: ArrowLoraConfig) -> ArrowLoraConfig:
    draft = copy.copy(config)
    for name in ("expert_names", "layouts", "expert_layouts", "expert_sources", "expert_licenses"):
        setattr(draft, name, list(getattr(config, name)))
    return draft
