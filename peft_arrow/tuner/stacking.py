"""From checked adapters to stacks of factors, in memory or in a store, read file after file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from ..library.adapter import Adapter
from ..library.base_modules import BaseModules
from ..library.lora import LoraContent
from .bank import FactorStacks, bank_shapes
from .config import ArrowLoraConfig
from .expert_store import ExpertStore, check_any_frozen, discarded_on_failure
from .fitting import read_on_base
from .heads import kept_head
from .store_options import Paging


class StoreRequest(NamedTuple):
    """How the experts of which PEFT adapter are to be paged."""

    paging: Paging
    adapter_name: str


@dataclass
class ResolvedExperts:
    """What `resolve` found.

    Args:
        config (`ArrowLoraConfig`): a copy of the user's config with names, layouts and target modules filled in.
        stacks (`dict[str, FactorStacks]`, *optional*): the weights by module; None for a saved model or fresh experts.
        head (`dict[str, torch.Tensor]`): the fully trained modules that an adapter brings, by parameter name.
        store (`ExpertStore`, *optional*): where the stacks of paged experts rest.
    """

    config: ArrowLoraConfig
    stacks: dict[str, FactorStacks] | None = None
    head: dict[str, torch.Tensor] = field(default_factory=dict)
    store: ExpertStore | None = None

    def take(self, module: str) -> FactorStacks | None:
        """The module's weights, handed over, so that a change of their dtype later does not need both in memory."""
        return None if self.stacks is None else self.stacks.pop(module)


def read_stacks(
    config: ArrowLoraConfig,
    adapters: list[Adapter],
    outlines: list[LoraContent],
    base: BaseModules,
    request: StoreRequest | None,
) -> ResolvedExperts:
    """Read adapter after adapter into the stacks; none is in memory while the next is read.

    Args:
        config (`ArrowLoraConfig`): resolved.
        adapters (`list[Adapter]`): what to read, in the order of the experts.
        outlines (`list[LoraContent]`): of each the shapes.
        base (`BaseModules`): of the base.
        request (`StoreRequest`, *optional*): have the frozen experts paged.
    """
    index = config.layout_index()
    wanted = {}
    for module in sorted(index.modules):
        experts = index.experts(module)
        factors = [outlines[position].factors[module] for position in experts.positions]
        wanted[module] = experts, [(factor.lora_A, factor.lora_B) for factor in factors]
    store = None if request is None else _open(request, wanted, base, is_main=config.inference_mode)
    with discarded_on_failure(store):
        stacks = {module: FactorStacks(*one, store=store, module=module) for module, one in wanted.items()}
        resolved = ResolvedExperts(config, stacks, store=store)
        progress = tqdm(adapters, desc="Reading adapters", disable=len(adapters) < 20)
        for position, adapter in enumerate(progress):
            _read_one(resolved, position, adapter, outlines, base)
        if store is not None:
            store.finish()
    return resolved


def _open(request: StoreRequest, wanted: dict[str, tuple], base: BaseModules, is_main: bool) -> ExpertStore:
    """A store for one of the banks, in the dtype that PEFT would give them: float32, or that of the base layer."""
    final = {}
    for module, one in wanted.items():
        shape = bank_shapes(*one).get(is_main)
        if shape is None:
            continue
        dtype, base_layer = shape.dtype, base.modules[module]
        weight = getattr(base_layer, "weight", None)
        base_dtype = getattr(base_layer, "compute_dtype", None) or getattr(weight, "dtype", None)
        if request.paging.autocast:
            dtype = torch.float32 if dtype.itemsize < 4 else dtype
        elif base_dtype is not None and base_dtype.is_floating_point:
            dtype = base_dtype
        final[module, is_main] = shape._replace(dtype=dtype)
    check_any_frozen(request.adapter_name, final)
    return ExpertStore(request.paging, request.adapter_name, final)


def _read_one(
    resolved: ResolvedExperts, position: int, adapter: Adapter, outlines: list[LoraContent], base: BaseModules
) -> None:
    content = read_on_base(adapter, base)
    for module in outlines[position].factors:
        factor = content.factors[module]
        resolved.stacks[module].put(position, factor.lora_A, factor.lora_B)
    if content.saved:
        resolved.head = kept_head(resolved.config, resolved.head, adapter.name, content.saved, outlines)
