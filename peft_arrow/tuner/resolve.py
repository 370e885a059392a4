"""From a user's config and a base model to experts with weights, checked before anything is changed."""

from __future__ import annotations

import copy
import logging
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
    clone_module,
    replicate_layers,
)
from torch import nn
from tqdm.auto import tqdm

from ..library.adapter import Adapter, config_of, list_locations, load, source_of
from ..library.lora import LoraContent, read_lora
from .base_change import undo_base_change
from .base_modules import BaseModules, is_match, is_supported
from .config import ArrowLoraConfig
from .layouts import make_layout


logger = logging.getLogger(__name__)

# The heads that `PeftModelForTokenClassification` and `PeftModelForQuestionAnswering` train in full.
HEADS = {"TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


@dataclass
class ResolvedExperts:
    """What `resolve` found.

    Args:
        config (`ArrowLoraConfig`): a copy of the user's config with names, layouts and target modules filled in.
        contents (`list[LoraContent]`): the weights, in the order of `config.expert_names`; empty for a saved model.
    """

    config: ArrowLoraConfig
    contents: list[LoraContent] = field(default_factory=list)

    def weights(self, module: str, positions: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """The factors of these experts in the module, or None for a saved model or fresh experts."""
        if not self.contents:
            return None
        factors = [self.contents[position].factors[module] for position in positions]
        return [(factor.lora_A, factor.lora_B) for factor in factors]


def resolve(config: ArrowLoraConfig, model: nn.Module) -> ResolvedExperts:
    """Read and check everything a config asks for.

    Raises:
        ValueError: no experts, or an adapter that does not fit the base; the message names the adapter, the module and
            what is allowed.
    """
    if config.adapters is not None:
        resolved = _resolve_adapters(config, model)
    elif config.layouts is not None:
        resolved = ResolvedExperts(copy.copy(config))
    elif config.num_experts is not None or config.expert_names:
        resolved = ResolvedExperts(config.fresh())
    else:
        raise ValueError("ArrowLoraConfig has neither adapters nor num_experts; pass one of them.")
    if resolved.config.modules_to_save is None:
        # PEFT names these heads in the config it was given, after the adapter has been made from our copy of it.
        heads = HEADS.get(resolved.config.task_type)
        resolved.config.modules_to_save = None if heads is None else list(heads)
    resolved.config.check_trainable_experts()
    if resolved.config.aggregation == "parameter":
        check_equal_ranks(resolved.config)
    return resolved


def _resolve_adapters(config: ArrowLoraConfig, model: nn.Module) -> ResolvedExperts:
    located = list_locations(config.adapters)
    names = list(config.expert_names or located)
    _log_repeated(names, located)
    replication = _common_replication(names, located)
    if replication:
        model = clone_module(model, share_weights=True)
        replicate_layers(model, replication)
    base = BaseModules(model)
    contents = []
    for name, place in tqdm(
        zip(names, located.values(), strict=True), total=len(names), desc="Reading adapters", disable=len(names) < 20
    ):
        contents.append(fit_to_base(load(name, place), base))
    resolved = copy.copy(config)
    resolved.adapters = None
    resolved.layer_replication = replication or config.layer_replication
    resolved.expert_names = names
    modules = {module for content in contents for module in content.factors}
    if config.target_modules is None:
        # PEFT counts layers only where a name is the end of a module's, not where it is the whole of it
        by_layer = config.layers_to_transform is not None
        resolved.target_modules = {module.rpartition(".")[2] for module in modules} if by_layer else modules
    take_heads(resolved, contents)
    contents = _restrict(resolved, contents, model)
    resolved.layouts, resolved.expert_layouts, resolved.expert_sources = [], [], []
    for place, content in zip(located.values(), contents, strict=True):
        add_layout(resolved, content, source_of(place))
    return ResolvedExperts(resolved, contents)


def _restrict(config: ArrowLoraConfig, contents: list[LoraContent], model: nn.Module) -> list[LoraContent]:
    """Keep of each expert the modules that the config targets, so that layouts say what is there."""
    _maybe_include_all_linear_layers(config, model)
    kept = []
    for name, content in zip(config.expert_names, contents, strict=True):
        factors = {
            module: factor
            for module, factor in content.factors.items()
            if is_match(BaseTuner._check_target_module_exists(config, module))
        }
        if not factors:
            raise ValueError(
                f"target_modules, exclude_modules and layers_to_transform leave no module of expert {name!r}; it has "
                f"{', '.join(sorted(content.factors)[:3])} ({len(content.factors)} in all)."
            )
        kept.append(replace(content, factors=factors))
    return kept


def _log_repeated(names: list[str], located: dict) -> None:
    """The same adapter twice is taken, as asked, but it can cost a token two of its `top_k` experts: say so."""
    known: dict[Any, str] = {}
    for name, place in zip(names, located.values(), strict=True):
        if isinstance(place, Adapter):
            key = id(place.tensors)
        else:
            key = place.folder.resolve() if place.folder else (place.repo_id, place.subfolder, place.revision)
        if key in known:
            logger.warning("Experts %r and %r are the same adapter; a token can be sent to both.", known[key], name)
        known.setdefault(key, name)


def _common_replication(names: list[str], located: dict) -> list | None:
    """The layer stacking that all adapters were trained with, or None."""
    found = {
        name: config_of(place).get("layer_replication") or None
        for name, place in zip(names, located.values(), strict=True)
    }
    first = next(iter(found.values()))
    for name, replication in found.items():
        if replication != first:
            raise ValueError(
                f"adapter {name!r} has layer_replication={replication!r} and {names[0]!r} has {first!r}; they are "
                "adapters of different models."
            )
    return [tuple(pair) for pair in first] if first else None


def add_layout(config: ArrowLoraConfig, content: LoraContent, source: str) -> None:
    """Append an expert's layout and source to a config, sharing the layout of an expert of the same shape."""
    layout = make_layout(
        {module: factor.lora_A.shape[0] for module, factor in content.factors.items()},
        {module: factor.scaling for module, factor in content.factors.items()},
        content.dropout,
    )
    if layout not in config.layouts:
        config.layouts.append(layout)
    config.expert_layouts.append(config.layouts.index(layout))
    config.expert_sources.append(source)


def take_heads(config: ArrowLoraConfig, contents: list[LoraContent]) -> None:
    """Settle which fully trained modules the routed model gets: there can be one of each.

    Raises:
        ValueError: experts bring different ones and `modules_to_save_from` does not say whose to take.
    """
    owners = [e for e, content in enumerate(contents) if content.saved]
    chosen = config.modules_to_save_from
    if chosen is not None and chosen not in [config.expert_names[e] for e in owners]:
        raise ValueError(
            f"modules_to_save_from={chosen!r} is not an expert with trained modules; allowed are "
            f"{[config.expert_names[e] for e in owners]}."
        )
    if not owners:
        return
    first = contents[owners[0]].saved
    differs = [e for e in owners if not _same_tensors(contents[e].saved, first)]
    if differs and chosen is None:
        raise ValueError(
            f"the experts {config.expert_names[owners[0]]!r} and {config.expert_names[differs[0]]!r} bring different "
            f"trained modules ({', '.join(sorted(first))}), and a routed model has one of each; pass "
            f"modules_to_save_from=<name of the expert whose to take>; allowed are "
            f"{[config.expert_names[e] for e in owners]}."
        )
    names = sorted({name for e in owners for name in contents[e].saved_modules})
    config.modules_to_save = sorted({*(config.modules_to_save or []), *names})


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


def fit_to_base(adapter: Adapter, base: BaseModules) -> LoraContent:
    """The adapter's content, after checking that each module exists in the base with those shapes.

    Raises:
        ValueError: a module is missing on either side, has another width, or is of an unsupported kind.
    """
    content = read_lora(adapter)
    where = f"adapter {adapter.name!r} ({adapter.source})"
    unknown = [module for module in content.factors if module not in base.modules]
    if unknown:
        raise ValueError(
            f"{where}: the base model has no module {unknown[0]!r} ({len(unknown)} of {len(content.factors)} modules "
            "are missing there); is the adapter for another base?"
        )
    targets = base.targets(adapter)
    absent = sorted(targets - set(content.factors))
    if absent:
        raise ValueError(
            f"{where}: its config targets {absent[0]!r}, but the file has no tensors for it ({len(absent)} modules "
            "are missing in the file)."
        )
    untargeted = sorted(set(content.factors) - targets)
    if untargeted:
        raise ValueError(
            f"{where}: the file has tensors for {untargeted[0]!r}, which its config does not target "
            f"({len(untargeted)} such modules)."
        )
    for module, factor in content.factors.items():
        _check_module(where, module, factor, base.modules[module])
    _check_saved(where, content, base)
    return undo_base_change(adapter, content, base.modules, base.initial_factors)


def _check_module(where: str, name: str, factor, module: nn.Module) -> None:
    if not is_supported(module):
        raise ValueError(
            f"{where}: {name} is a {type(module).__name__}; supported are Linear, Conv1D of transformers and "
            "quantised linear modules."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = _get_in_out_features(module)
    found = (factor.lora_A.shape[1], factor.lora_B.shape[0])
    if tuple(expected) != found:
        raise ValueError(
            f"{where}: {name} maps {found[0]} to {found[1]} features in the adapter, {expected[0]} to {expected[1]} "
            "in the base model; is the adapter for another base?"
        )


def _check_saved(where: str, content: LoraContent, base: BaseModules) -> None:
    for key, tensor in content.saved.items():
        known = base.parameter(key)
        if known is None or known.shape != tensor.shape:
            found = "nothing" if known is None else f"shape {tuple(known.shape)}"
            raise ValueError(
                f"{where}: the trained module's {key!r} has shape {tuple(tensor.shape)}, the base model has {found} "
                "there."
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{where}: {key} holds NaN or Inf.")
    for key, tensor in content.copies.items():
        known = base.parameter(key)
        if (
            known is None
            or known.shape != tensor.shape
            or not torch.equal(known.detach().cpu(), tensor.to(known.dtype))
        ):
            raise ValueError(
                f"{where}: the file holds {key!r} with other values than the base model, which a routed low-rank "
                "update cannot express (a trained bias, or an embedding that was resized or trained)."
            )
