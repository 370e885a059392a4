"""Choosing, fitting and pinning: the methods of a routed model that say where tokens go."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..router_fitting import PromptHead, calibrate, fit
from ..routers import ROUTERS, SELECTION_FIELDS, check_router
from .mixed_batch import pin_hooks
from .requests import RequestTracker
from .routing import decides_once
from .shared_input import shared_inputs
from .tying import tied_groups


# Fields of a config that `set_router` takes beside the router's own options.
SETTINGS = tuple("router_temperature" if name == "temperature" else name for name in SELECTION_FIELDS)


class RouterMethods:
    """Methods of `ArrowLoraModel` that are about routers."""

    def set_router(self, router: str | None = None, **options: Any) -> None:
        """Change how the active adapter routes; what is not named keeps its value. Saved with the model.

        Args:
            router (`str`, *optional*): a key of `ROUTERS`. Another router starts with its own defaults.
            options:
                `top_k`, `router_temperature`, `top_p`, `granularity`, `tied`, `null_expert`, `masked_experts`,
                `calibrated`, and the router's own options.

        Raises:
            ValueError: a value is not allowed, or the router needs `fit_router` or `calibrate_router` first.
            TypeError: an unknown option.
        """
        adapter_name = self.active_arrow_adapter()
        draft = self._router_draft(adapter_name, router, options)
        draft.check_ready()
        self._use_config(adapter_name, draft)

    def _router_draft(self, adapter_name: str, router: str | None, options: Mapping[str, Any]):
        """A copy of the adapter's config with other settings of the router."""
        config = self.peft_config[adapter_name]
        name = check_router(config.router if router is None else router)
        own = ROUTERS[name].options
        unknown = sorted(set(options) - set(SETTINGS) - set(own))
        if unknown:
            allowed = ", ".join((*SETTINGS, *own))
            raise TypeError(
                f"set_router got an unknown argument {unknown[0]!r}; allowed are router, {allowed} (router={name!r})."
            )
        kept = dict(config.router_options or {}) if name == config.router else {}
        kept.update({key: value for key, value in options.items() if key in own})
        changes = {key: value for key, value in options.items() if key in SETTINGS}
        if isinstance(changes.get("masked_experts"), (tuple, set)):
            changes["masked_experts"] = sorted(changes["masked_experts"])
        return config.changed(router=name, router_options=kept or None, **changes)

    def _use_config(self, adapter_name: str, config: Any) -> None:
        self.peft_config[adapter_name] = config
        self.apply_router(adapter_name)

    def apply_router(self, adapter_name: str) -> None:
        """Give every layer of an adapter the router that its config says."""
        config = self.peft_config[adapter_name]
        router = config.make_router()
        layers = self.routed_layers(adapter_name)
        groups = tied_groups({name: layer.in_features for name, layer in layers.items()})
        masked = frozenset(config.expert_names.index(name) for name in config.masked_experts or ())
        for name, layer in layers.items():
            layer.module_name = name
            layer.routers[adapter_name] = router
            layer.masked[adapter_name] = masked
            layer.tied[adapter_name] = tuple(layers[peer] for peer in groups.get(name, ()) if config.tied)
        sharing = dict.fromkeys(groups.get(name, (name,)) for name in layers)
        for shared in shared_inputs([[layers[name] for name in group] for group in sharing], adapter_name):
            for layer in shared.members:
                layer.shared[adapter_name] = shared
        self._follow_requests()

    def _follow_requests(self) -> None:
        """Follow the calls of the model where a router needs it; the others are spared the cost."""
        tracker = self._tracker()
        tracker.version += 1
        layers = self.routed_layers().values()
        if any(decides_once(router) for layer in layers for router in layer.routers.values()):
            tracker.watch(self.model, self.prompt_logits)
        else:
            tracker.unwatch()
        for layer in layers:
            layer.requests = tracker if tracker.is_watching else None

    def _tracker(self) -> RequestTracker:
        if "_requests" not in self.__dict__:
            self.__dict__["_requests"] = RequestTracker()
        return self.__dict__["_requests"]

    @contextlib.contextmanager
    def bare(self) -> Iterator[None]:
        """While open, the model is the base model for this thread, and nothing else of it changes."""
        tracker = self._tracker()
        before = {layer: layer.requests for layer in self.routed_layers().values()}
        for layer in before:
            layer.requests = tracker
        try:
            with tracker.bare():
                yield
        finally:
            for layer, requests in before.items():
                layer.requests = requests

    @contextlib.contextmanager
    def routing_prompt(self, mask: torch.Tensor) -> Iterator[None]:
        """Let only these tokens decide where one choice is made a request: the prompt, and not what follows it.

        Args:
            mask (`torch.Tensor`): bool (B, S), one entry a token of the next call. Without it all tokens that are no
                padding decide, which is right for `generate`, whose first call has the prompt alone.
        """
        with self._tracker().deciding(mask):
            yield

    @contextlib.contextmanager
    def pin_experts(self, experts: Sequence[Any]) -> Iterator[None]:
        """While open, each row of the batch goes to the experts named for it, whatever router is set.

        Args:
            experts (`Sequence`):
                One entry a batch row: a name; None for the bare base; a list of names, equal weights; or a dict name
                -> weight, used as given. A module that an expert lacks gets nothing from it.

        Raises:
            ValueError: an unknown name; during the call, where the batch has another number of rows.
        """
        names = self.peft_config[self.active_arrow_adapter()].expert_names
        with pin_hooks(self, [_pins(row, names) for row in experts]):
            yield

    def fit_router(self, name: str, datasets: Mapping[str, Any], *, tokenizer: Any = None, **options: Any) -> None:
        """Collect what a router needs from data, store it with the model, and use that router.

        Args:
            name (`str`): a router with `needs_data`: `centroid`, `task_predictor`, `phatgoose` or `retrieval`.
            datasets (`Mapping`):
                Expert -> rows: a `datasets.Dataset` or a list of dicts with `prompt` and `completion`, `messages`,
                `instruction` and `output`, or `text`. Every expert needs some.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): by default that of the base's Hub id or folder.
            options: see `peft_arrow.router_fitting.fit`; `max_rows`, `batch_size`, `max_length`, `seed`, `steps` ...

        Raises:
            ValueError: the router needs no data, an expert has no rows, or rows have other columns.
        """
        adapter_name = self.active_arrow_adapter()
        config = self.peft_config[adapter_name]
        found = fit(self, check_router(name), datasets, tokenizer=tokenizer, **options)
        for module, rows_EI in found.rows.items():
            self._store(name, adapter_name, self.routed_layers()[module], rows_EI)
        if found.head is not None:
            self.prompt_heads(name)[adapter_name] = found.head.to(next(self.model.parameters()).device)
        fitted = {**(config.fitted or {}), name: {"experts": list(config.expert_names), **found.info}}
        draft = self._router_draft(adapter_name, name, {"calibrated": False}).changed(fitted=fitted)
        self._use_config(adapter_name, draft)

    def calibrate_router(self, *, sequences: int = 32, length: int = 64, batch_size: int = 8, seed: int = 0) -> None:
        """Measure mean and spread of the router's logits on text that the base model writes, and standardise by them.

        Per expert and module: logit' = (logit - mean) / spread. Raw scores follow the length of the inputs and let
        some experts win whatever the text is; no user data is needed to correct that.

        Args:
            sequences, length (`int`): how much text the base writes, freely from its first token, sampled at
                temperature 1.
            batch_size (`int`): sequences written at a time.
            seed (`int`): of the sampling; the global random state is kept.

        Raises:
            ValueError: the base cannot generate, or the router gives no logits to measure.
        """
        adapter_name = self.active_arrow_adapter()
        draft = self._router_draft(adapter_name, None, {"calibrated": False})
        settings = {"sequences": sequences, "length": length, "batch_size": batch_size, "seed": seed}
        stats = calibrate(self, adapter_name, **settings)
        layers = self.routed_layers()
        for module, stats_E2 in stats.items():
            self._store("calibration", adapter_name, layers[module], stats_E2)
        calibration = {"router": draft.router, "router_options": draft.make_router().chosen, **settings}
        calibration["experts"] = list(draft.expert_names)
        self._use_config(adapter_name, draft.changed(calibrated=True, calibration=calibration))

    @staticmethod
    def _store(name: str, adapter_name: str, layer: nn.Module, rows: torch.Tensor) -> None:
        module = layer.make_stored(name, adapter_name)
        with torch.no_grad():
            module.weight.copy_(rows)

    def prompt_heads(self, router: str) -> nn.ModuleDict:
        """PEFT adapter -> the linear map of a prompt-level router."""
        name = f"arrow_lora_{router}"
        if name not in self._modules:
            setattr(self, name, nn.ModuleDict())
        return getattr(self, name)

    def _make_prompt_heads(self, adapter_name: str, config: Any) -> None:
        """Room for the maps of prompt-level routers that a checkpoint is about to fill."""
        for name, info in (config.fitted or {}).items():
            if ROUTERS[name].is_prompt_level:
                head = PromptHead(info["scores"], info["features"], is_cosine=name == "retrieval")
                self.prompt_heads(name)[adapter_name] = head

    def drop_prompt_heads(self, adapter_name: str) -> None:
        """Forget the maps of the prompt-level routers of an adapter."""
        for name, router in ROUTERS.items():
            if router.is_prompt_level and adapter_name in self.prompt_heads(name):
                del self.prompt_heads(name)[adapter_name]

    def prompt_logits(self, inputs: Mapping[str, torch.Tensor], mask_BS: torch.Tensor | None) -> dict:
        """PEFT adapter -> router logits (B, E) of the active adapters that decide by the prompt."""
        found = {}
        for adapter_name in self.active_adapters:
            config = self.peft_config[adapter_name]
            router = next((layer.routers[adapter_name] for layer in self.routed_layers().values()), None)
            if router is None or not router.is_prompt_level or not inputs:
                continue
            head: PromptHead = self.prompt_heads(config.router)[adapter_name]
            owners = config.fitted[config.router].get("owners", [])
            features_BF = self.prompt_features(inputs, mask_BS)
            found[adapter_name] = router.prompt_logits(head(features_BF), owners, len(config.expert_names))
        return found

    @torch.no_grad()
    def prompt_features(self, inputs: Mapping[str, torch.Tensor], mask_BS: torch.Tensor | None) -> torch.Tensor:
        """Mean of the base model's last hidden states over the tokens of the mask, float32 (B, F), without experts."""
        tensor = next(iter(inputs.values()))
        mask_BS = torch.ones(tensor.shape[:2], dtype=torch.bool, device=tensor.device) if mask_BS is None else mask_BS
        encoder = self.model.get_encoder() if self.model.config.is_encoder_decoder else self.model.base_model
        kwargs = {} if self.model.config.is_encoder_decoder else {"use_cache": False}
        if "position_ids" in inspect.signature(encoder.forward).parameters:
            kwargs["position_ids"] = (mask_BS.long().cumsum(1) - 1).clamp_min(0)
        with self.bare():
            states_BSF = encoder(**inputs, attention_mask=mask_BS.long(), **kwargs).last_hidden_state.float()
        weights_BS1 = mask_BS.to(states_BSF).unsqueeze(-1)
        return (states_BSF * weights_BS1).sum(1) / weights_BS1.sum(1)


def _pins(row: Any, names: Sequence[str]) -> dict[int, float]:
    """Position -> weight of one row of `pin_experts`."""
    if row is None:
        return {}
    if isinstance(row, str):
        row = {row: 1.0}
    elif not isinstance(row, Mapping):
        row = dict.fromkeys(row, 1.0 / max(len(row), 1))
    unknown = [name for name in row if name not in names]
    if unknown:
        raise ValueError(f"experts holds {unknown[0]!r}; allowed are None and {list(names)}.")
    return {names.index(name): float(weight) for name, weight in row.items()}
