"""From a user's config and a base model to experts with weights, checked before anything is changed."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers, clone_module, replicate_layers
from torch import nn
from tqdm.auto import tqdm

from ..library.adapter import Adapter, download, license_of, list_locations, load, source_of
from ..library.base_modules import BaseModules, is_match
from ..library.files import WeightsFile
from ..library.lora import LoraContent
from ..library.lora_config import check_config
from ..library.reading import Location
from .bank import FactorStacks
from .config import ArrowLoraConfig
from .fitting import outline_on_base, read_on_base
from .layouts import make_layout


logger = logging.getLogger(__name__)

# The heads that `PeftModelForTokenClassification` and `PeftModelForQuestionAnswering` train in full.
HEADS = {"TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


@dataclass
class ResolvedExperts:
    """What `resolve` found.

    Args:
        config (`ArrowLoraConfig`): a copy of the user's config with names, layouts and target modules filled in.
        stacks (`dict[str, FactorStacks]`, *optional*): the weights by module; None for a saved model or fresh experts.
        head (`dict[str, torch.Tensor]`): the fully trained modules that an adapter brings, by parameter name.
    """

    config: ArrowLoraConfig
    stacks: dict[str, FactorStacks] | None = None
    head: dict[str, torch.Tensor] = field(default_factory=dict)

    def take(self, module: str) -> FactorStacks | None:
        """The module's weights, handed over, so that a change of their dtype later does not need both in memory."""
        return None if self.stacks is None else self.stacks.pop(module)


def resolve(config: ArrowLoraConfig, model: nn.Module) -> ResolvedExperts:
    """Read and check everything a config asks for.

    Adapters are looked at twice: the configs and the headers of all files are checked, then room is made for the
    stacked weights, and file after file is read into it. So the weights are in memory once, and an adapter that does
    not fit is refused before any weight is read.

    Raises:
        ValueError: no experts, or an adapter that does not fit the base; the message names the adapter, the module and
            what is allowed.
    """
    if config.adapters is not None:
        return _resolve_adapters(config, model)
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


def _resolve_adapters(config: ArrowLoraConfig, model: nn.Module) -> ResolvedExperts:
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
    return _read(resolved, adapters, outlines, base)


def _read(
    config: ArrowLoraConfig, adapters: list[Adapter], outlines: list[LoraContent], base: BaseModules
) -> ResolvedExperts:
    """Read adapter after adapter into the stacks; none is in memory while the next is read."""
    index = config.layout_index()
    resolved = ResolvedExperts(config, stacks={})
    for module in sorted(index.modules):
        experts = index.experts(module)
        factors = [outlines[position].factors[module] for position in experts.positions]
        resolved.stacks[module] = FactorStacks(experts, [(factor.lora_A, factor.lora_B) for factor in factors])
    progress = tqdm(adapters, desc="Reading adapters", disable=len(adapters) < 20)
    for position, adapter in enumerate(progress):
        _read_one(resolved, position, adapter, outlines, base)
    return resolved


def _read_one(
    resolved: ResolvedExperts, position: int, adapter: Adapter, outlines: list[LoraContent], base: BaseModules
) -> None:
    content = read_on_base(adapter, base)
    for module in outlines[position].factors:
        factor = content.factors[module]
        resolved.stacks[module].put(position, factor.lora_A, factor.lora_B)
    if content.saved:
        _keep_head(resolved, adapter.name, content.saved, outlines)


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
    owners = _head_owners(config, outlines)
    chosen = config.modules_to_save_from
    if chosen is not None and chosen not in owners:
        raise ValueError(
            f"modules_to_save_from={chosen!r} is not an expert with trained modules; allowed are {owners}."
        )
    if owners:
        names = {name for outline in outlines for name in outline.saved_modules}
        config.modules_to_save = sorted({*(config.modules_to_save or []), *names})


def _head_owners(config: ArrowLoraConfig, outlines: list[LoraContent]) -> list[str]:
    return [name for name, outline in zip(config.expert_names, outlines, strict=True) if outline.saved]


def _keep_head(
    resolved: ResolvedExperts, name: str, saved: dict[str, torch.Tensor], outlines: list[LoraContent]
) -> None:
    """Keep the one head that the routed model gets: the chosen expert's, or the one that all experts share.

    Raises:
        ValueError: experts bring different ones and `modules_to_save_from` does not say whose to take.
    """
    chosen = resolved.config.modules_to_save_from
    if name == chosen or (chosen is None and not resolved.head):
        resolved.head = saved
    elif chosen is None and not _same_tensors(saved, resolved.head):
        owners = _head_owners(resolved.config, outlines)
        raise ValueError(
            f"the experts {owners[0]!r} and {name!r} bring different trained modules "
            f"({', '.join(sorted(resolved.head))}), and a routed model has one of each; pass "
            f"modules_to_save_from=<name of the expert whose to take>; allowed are {owners}."
        )


def _same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


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
