"""The tuner: what PEFT calls to put routed experts into a base model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule, replicate_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_quantization_kwargs
from torch import nn

from ..library.base_modules import is_match, is_supported
from ..ops import check_kernel, log_choice
from ..routers import Router
from .config import ArrowLoraConfig
from .editing import EditingMixin
from .expert_store import discarded_on_failure
from .heads import load_saved_modules
from .layer import ArrowLoraLayer, ArrowLoraLinear
from .layouts import LayoutIndex
from .loading import from_pretrained
from .mixed_batch import row_target_hooks
from .paging import PagingMixin
from .peft_type import PREFIX
from .prototype_state import building_suspended
from .resolve import ResolvedExperts, resolve
from .router_methods import RouterMethods
from .state_dict import from_checkpoint, prompt_keys, to_checkpoint, with_adapter
from .trace import RoutingTrace
from .trace_hooks import record_routing


class ArrowLoraModel(RouterMethods, EditingMixin, PagingMixin, BaseTuner):
    """
    Routes every token, in every adapted layer, to the LoRA adapters (experts) that suit it. The method is described in
    https://huggingface.co/papers/2405.11157.

    Args:
        model (`torch.nn.Module`): The model to which the adapter tuner layers will be attached.
        config ([`ArrowLoraConfig`]): The configuration of the routed model.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`. One PEFT adapter is one library of
            experts.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`):
            Create empty adapter weights on meta device. Useful to speed up the loading process.

    Returns:
        `torch.nn.Module`: The routed model.

    Example:

        ```py
        >>> from peft_arrow import ArrowLoraModel

        >>> model = ArrowLoraModel.from_pretrained("base-model", adapters=["adapter-1", "adapter-2"], top_k=2)
        ```

    **Attributes**:
        - **model** ([`~torch.nn.Module`]) -- The model to be adapted.
        - **peft_config** ([`ArrowLoraConfig`]): The configuration of the routed model.
    """

    prefix: str = PREFIX
    tuner_layer_cls = ArrowLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    _resolved: ResolvedExperts | None = None
    _index: LayoutIndex | None = None
    _router: Router | None = None
    _from_state_dict: bool = False

    @classmethod
    def from_pretrained(cls, base: Any, adapters: Any, **kwargs: Any):
        """Load a base model and route it between adapters; see [`peft_arrow.tuner.loading.from_pretrained`]."""
        return from_pretrained(base, adapters, **kwargs)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """As in PEFT; the config is copied, and all adapters are read and checked before the model is changed."""
        self.__dict__.setdefault("expert_stores", {})
        resolved = resolve(self.peft_config[adapter_name], model, adapter_name)
        for module in model.modules():  # TRL copies the policy's parameters, prototypes too, into its reference
            if isinstance(module, ArrowLoraLayer):
                module.build_prototypes()
        self.peft_config[adapter_name] = resolved.config
        config = resolved.config
        self._resolved, self._index, self._from_state_dict = resolved, config.layout_index(), state_dict is not None
        self._router = config.make_router()
        self._make_prompt_heads(adapter_name, config)
        config._modules, config._has_fresh = self._index.modules, self._index.has_fresh
        try:
            with discarded_on_failure(resolved.store):
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
                self.apply_router(adapter_name)
                if resolved.head:
                    load_saved_modules(self.model, adapter_name, resolved.head)
            if resolved.store is not None:
                self.expert_stores[adapter_name] = resolved.store
            log_choice("auto")
        finally:
            self._resolved = self._index = self._router = None

    def _prepare_adapter_config(self, peft_config: ArrowLoraConfig, model_config: dict) -> ArrowLoraConfig:
        if peft_config.__dict__.get("_modules") and not peft_config.target_modules:
            peft_config.target_modules = set(peft_config._modules)
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: ArrowLoraConfig, model: nn.Module) -> None:
        if peft_config.layer_replication:
            replicate_layers(model, peft_config.layer_replication)

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str):
        """The targeted modules that an expert has; a model with fresh experts has all targeted ones."""
        matched = BaseTuner._check_target_module_exists(peft_config, key)
        has_expert = key in peft_config.__dict__.get("_modules", ())
        if isinstance(matched, _ExcludedModule):
            return matched
        return matched or has_expert if peft_config.__dict__.get("_has_fresh", True) else matched and has_expert

    def _create_and_replace(
        self,
        arrow_config: ArrowLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        is_targeted = self._from_state_dict or is_match(
            BaseTuner._check_target_module_exists(arrow_config, current_key)
        )
        experts = self._index.experts(current_key, is_targeted)
        if experts is None:
            return
        kwargs = {
            "experts": experts,
            "router": self._router,
            "aggregation": arrow_config.aggregation,
            "prototype_update": arrow_config.prototype_update,
            "stacks": self._resolved.take(current_key),
            "init_weights": arrow_config.init_weights if self._index.has_fresh else None,
            "inference_mode": arrow_config.inference_mode,
            "keep_frozen": arrow_config.keeps_frozen(),
            "stored": arrow_config.stored(),
        }
        if isinstance(target, ArrowLoraLayer):
            target.update_layer(adapter_name, **kwargs)
            return
        new_module = self._create_new_module(adapter_name, target, **kwargs, **get_quantization_kwargs(self))
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    @staticmethod
    def _create_new_module(adapter_name: str, target: nn.Module, **kwargs: Any) -> ArrowLoraLinear:
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not is_supported(base_layer):
            raise TypeError(
                f"Target module {target} is not supported. Supported are torch.nn.Linear, Conv1D of transformers and "
                "quantised linear modules."
            )
        return ArrowLoraLinear(target, adapter_name, **kwargs)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As in PEFT; with `autocast_adapter_dtype=False` loaded factors get the base layer's dtype."""
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            return
        for layer in self.routed_layers(adapter_name).values():
            layer._move_adapter_to_device_of_base_layer(adapter_name, cast=True)

    def routed_layers(self, adapter_name: str | None = None) -> dict[str, ArrowLoraLayer]:
        """The routed layers by the base's own module names; with `adapter_name` those that have experts of it."""
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, ArrowLoraLayer) and (adapter_name is None or adapter_name in module.experts)
        }

    def active_arrow_adapter(self) -> str:
        """The PEFT adapter that the methods of a routed model act on.

        Raises:
            ValueError: none or several are active.
        """
        if len(self.active_adapters) != 1:
            raise ValueError(f"active adapters are {self.active_adapters}; activate one with set_adapter first.")
        return self.active_adapters[0]

    @property
    def expert_names(self) -> list[str]:
        """Names of the active adapter's experts, in routing order."""
        return list(self.peft_config[self.active_arrow_adapter()].expert_names)

    def set_kernel(self, kernel: str) -> None:
        """Choose how experts are applied: `"auto"` or a key of `KERNELS`. Results agree; not saved."""
        log_choice(check_kernel(kernel))
        adapter_name = self.active_arrow_adapter()
        for layer in self.routed_layers().values():
            if adapter_name in layer.kernels:
                layer.kernels[adapter_name] = kernel

    def set_scale(self, scale: float) -> None:
        """Multiply the active adapter's routed update by `scale` in every layer; 1 is the original. Not saved."""
        for layer in self.routed_layers().values():
            layer.set_scale(self.active_arrow_adapter(), scale)

    def build_prototypes(self) -> None:
        """Build every prototype that is missing or stale, for all adapters; needed before compiling or exporting."""
        for layer in self.routed_layers().values():
            layer.build_prototypes()

    def refresh_prototypes(self) -> None:
        """Rebuild every prototype. Needed after edits through `.data`, which nothing can detect."""
        for layer in self.routed_layers().values():
            layer.build_prototypes(rebuild=True)
            layer.forget_plans()

    @contextlib.contextmanager
    def trace_routing(self, tasks: Sequence[str] | None = None) -> Iterator[RoutingTrace]:
        """Record which experts every token went to while the context is open; see [`RoutingTrace`].

        Args:
            tasks (`Sequence[str]`, *optional*): the task of each row of the batch, for tables and pictures by task.
        """
        adapter_name = self.active_arrow_adapter()
        with record_routing(self.model, self.routed_layers(), adapter_name, self.expert_names, tasks) as trace:
            yield trace

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT; what prompt-level routers stored for the adapter goes too, and the file of paged experts."""
        super().delete_adapter(adapter_name)
        self.drop_store(adapter_name)
        self.drop_prompt_heads(adapter_name)

    def train(self, mode: bool = True):
        """As in torch; if nothing is trainable, the first backward raises and names `is_trainable=True`."""
        super().train(mode)
        frozen = mode and self.nothing_trains()
        for layer in self.routed_layers().values():
            layer.inference_owner = self.nothing_trains if frozen else None
        return self

    def nothing_trains(self) -> bool:
        """Whether no parameter of the whole model requires a gradient."""
        return not any(parameter.requires_grad for parameter in self.model.parameters())

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """`adapter_names=[...]`: one adapter, expert or `"__base__"` per batch row."""
        adapter_names = kwargs.pop("adapter_names", None)
        with row_target_hooks(self, adapter_names, kwargs) if adapter_names is not None else contextlib.nullcontext():
            yield

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(
            "A routed model cannot be merged into the base, because every token gets other weights. "
            "model.export_lora(folder) writes one plain LoRA, the weighted mean of the experts, which can be merged."
        )

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        heads = {key: state_dict[key] for key in prompt_keys(state_dict) if f".{adapter_name}." in key}
        return to_checkpoint(model, adapter_name, {**selected, **heads})

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        with building_suspended():
            banks = from_checkpoint(model, adapter_name, state_dict)
            heads = prompt_keys(banks)
            return super()._remap_adapter_state_dict_for_load(
                model, config, adapter_name, {key: value for key, value in banks.items() if key not in heads}
            ) | {with_adapter(key, adapter_name): banks[key] for key in heads}
