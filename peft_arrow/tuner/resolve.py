"""From a user's config and a base model to experts with weights, checked before anything is changed."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers, clone_module, replicate_layers
from torch import nn

from ..library.adapter import Adapter, download, license_of, list_locations, load, source_of
from ..library.base_modules import BaseModules, is_match
from ..library.files import WeightsFile
from ..library.lora import LoraContent
from ..library.lora_config import check_config
from ..library.reading import Location
from .config import ArrowLoraConfig
from .fitting import outline_on_base
from .heads import head_owners
from .layouts import make_layout
from .stacking import ResolvedExperts, StoreRequest, read_stacks


logger = logging.getLogger(__name__)

# The heads that `PeftModelForTokenClassification` and `PeftModelForQuestionAnswering` train in full.
HEADS = {"TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


def resolve(config: ArrowLoraConfig, model: nn.Module, adapter_name: str = "default") -> ResolvedExperts:
    """Read and check everything a config asks for.

    Adapters are looked at twice: the configs and the headers of all files are checked, then room is made for the
    stacked weights, and file after file is read into it. So the weights are in memory once, and an adapter that does
    not fit is refused before any weight is read.

    Args:
        config (`ArrowLoraConfig`): the user's.
        model (`nn.Module`): the base.
        adapter_name (`str`): the PEFT adapter, for the name of a store's file.

    Raises:
        ValueError: no experts, or an adapter that does not fit the base; the message names the adapter, the module and
            what is allowed.
    """
    if config.adapters is not None:
        paging = config.__dict__.pop("_paging", None)
        request = None if paging is None else StoreRequest(paging, adapter_name)
        return _resolve_adapters(config, model, request)
    if config.layouts is not None:
        resolved = copy.copy(config)
    elif config.num_experts is not None or config.expert_names:
        resolved = config.fresh()
    else:
        raise ValueError("ArrowLoraConfig has neither adapters nor num_experts; pass one of them.")
    _complete(resolved)
    return ResolvedExperts(resolved)


def _complete(config: ArrowLoraConfig) -> None:
    """Fill in and check what does not depend on where the experts come from."""
    if config.modules_to_save is None:
        # PEFT names these heads in the config it was given, after the adapter has been made from our copy of it.
        heads = HEADS.get(config.task_type)
        config.modules_to_save = None if heads is None else list(heads)
    config.check_trainable_experts()
    config.check_ready()
    if config.aggregation == "parameter":
        check_equal_ranks(config)


def _resolve_adapters(config: ArrowLoraConfig, model: nn.Module, request: StoreRequest | None) -> ResolvedExperts:
    located = list_locations(config.adapters)
    names = list(config.expert_names or located)
    _log_repeated(names, located)
    adapters = [load(name, place) for name, place in zip(names, located.values(), strict=True)]
    for adapter in adapters:
        check_config(adapter)  # all of them before the first file, which may have to be downloaded
    replication = _common_replication(adapters)
    if replication:
        model = _replicated(model, replication, adapters[0])
    base = BaseModules(model)
    download(adapters)
    outlines = [outline_on_base(adapter, base) for adapter in adapters]
    resolved = copy.copy(config)
    resolved.adapters = None
    resolved.layer_replication = replication or config.layer_replication
    resolved.expert_names = names
    modules = {module for outline in outlines for module in outline.factors}
    if config.target_modules is None:
        # PEFT counts layers only where a name is the end of a module's, not where it is the whole of it
        by_layer = config.layers_to_transform is not None
        resolved.target_modules = {module.rpartition(".")[2] for module in modules} if by_layer else modules
    take_heads(resolved, outlines)
    outlines = _restrict(resolved, outlines, model)
    resolved.layouts, resolved.expert_layouts = [], []
    resolved.expert_sources, resolved.expert_licenses = [], []
    for place, outline in zip(located.values(), outlines, strict=True):
        add_layout(resolved, outline, place)
    _complete(resolved)
    return read_stacks(resolved, adapters, outlines, base, request)


def _restrict(config: ArrowLoraConfig, outlines: list[LoraContent], model: nn.Module) -> list[LoraContent]:
    """Keep of each expert the modules that the config targets, so that layouts say what is there."""
    _maybe_include_all_linear_layers(config, model)
    modules = dict.fromkeys(module for outline in outlines for module in outline.factors)
    targeted = {module for module in modules if is_match(BaseTuner._check_target_module_exists(config, module))}
    kept = []
    for name, outline in zip(config.expert_names, outlines, strict=True):
        factors = {module: factor for module, factor in outline.factors.items() if module in targeted}
        if not factors:
            raise ValueError(
                f"target_modules, exclude_modules and layers_to_transform leave no module of expert {name!r}; it has "
                f"{', '.join(sorted(outline.factors)[:3])} ({len(outline.factors)} in all)."
            )
        kept.append(replace(outline, factors=factors))
    return kept


def _log_repeated(names: list[str], located: dict) -> None:
    """The same adapter twice is taken, as asked, but it can cost a token two of its `top_k` experts: say so."""
    known: dict[Any, str] = {}
    for name, place in zip(names, located.values(), strict=True):
        key = _identity(place)
        if key in known:
            logger.warning("Experts %r and %r are the same adapter; a token can be sent to both.", known[key], name)
        known.setdefault(key, name)


def _identity(place: Adapter | Location) -> tuple | Path | int:
    if isinstance(place, Adapter):
        if not isinstance(place.tensors, WeightsFile):
            return id(place.tensors)
        place = place.tensors.place
    return place.folder.resolve() if place.folder else (place.repo_id, place.subfolder, place.commit or place.revision)


def _common_replication(adapters: list[Adapter]) -> list | None:
    """The layer stacking that all adapters were trained with, or None."""
    found = {adapter.name: adapter.config.get("layer_replication") or None for adapter in adapters}
    first = next(iter(found.values()))
    for name, replication in found.items():
        if replication != first:
            raise ValueError(
                f"adapter {name!r} has layer_replication={replication!r} and {adapters[0].name!r} has {first!r}; they "
                "are adapters of different models."
            )
    return [tuple(pair) for pair in first] if first else None


def _replicated(model: nn.Module, replication: list, adapter: Adapter) -> nn.Module:
    """The base with its layers stacked as the adapters were trained on; the weights are shared."""
    model = clone_module(model, share_weights=True)
    try:
        replicate_layers(model, replication)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{adapter.where}: its config has layer_replication={replication!r}, which does not fit the base: {error}"
        ) from error
    return model


def add_layout(config: ArrowLoraConfig, content: LoraContent, place: Adapter | Location) -> None:
    """Append an expert's layout and origin to a config, sharing the layout of an expert of the same shape."""
    layout = make_layout(
        {module: factor.lora_A.shape[0] for module, factor in content.factors.items()},
        {module: factor.scaling for module, factor in content.factors.items()},
        content.dropout,
    )
    if layout not in config.layouts:
        config.layouts.append(layout)
    config.expert_layouts.append(config.layouts.index(layout))
    config.expert_sources.append(source_of(place))
    config.expert_licenses.append(license_of(place))


def take_heads(config: ArrowLoraConfig, outlines: list[LoraContent]) -> None:
    """Name the fully trained modules that the experts bring in `modules_to_save`.

    Raises:
        ValueError: `modules_to_save_from` is not an expert that brings some.
    """
    owners = head_owners(config, outlines)
    chosen = config.modules_to_save_from
    if chosen is not None and chosen not in owners:
        raise ValueError(
            f"modules_to_save_from={chosen!r} is not an expert with trained modules; allowed are {owners}."
        )
    if owners:
        names = {name for outline in outlines for name in outline.saved_modules}
        config.modules_to_save = sorted({*(config.modules_to_save or []), *names})


def check_equal_ranks(config: ArrowLoraConfig) -> None:
    """Raise a `ValueError` unless every module's experts have one rank, as `aggregation="parameter"` needs."""
    index = config.layout_index()
    for module in sorted(index.modules):
        ranks = sorted(set(index.experts(module).ranks))
        if len(ranks) > 1:
            raise ValueError(
                f"aggregation='parameter' needs one rank per module, but {module} has experts of ranks {ranks}; use "
                "aggregation='output'."
            )
