"""The two banks of a layer: linear modules over the concatenated ranks of their experts."""

from __future__ import annotations

import functools
import math

import torch
from torch import nn

from ..ops import bank_constants
from .expert_store import BankShape, ExpertStore
from .layouts import LayerExperts


BANKS = {True: ("arrow_lora_A", "arrow_lora_B"), False: ("arrow_lora_frozen_A", "arrow_lora_frozen_B")}


def bank_modules(layer: nn.Module, adapter_name: str, is_main: bool) -> tuple[nn.Linear, nn.Linear]:
    """lora_A and lora_B of a bank."""
    name_A, name_B = BANKS[is_main]
    return getattr(layer, name_A)[adapter_name], getattr(layer, name_B)[adapter_name]


class PagedLinear(nn.Linear):
    """A linear module whose frozen weight rests in an `ExpertStore`: it stays there when the model moves."""

    def _apply(self, fn, recurse: bool = True):
        self.check_dtype(fn)
        return self

    def check_dtype(self, fn) -> None:
        """Raise a `ValueError` where `fn`, as torch applies it to all weights of a model, would change the dtype."""
        before = self.weight.dtype
        after = fn(torch.empty(0, dtype=before, device=self.weight.device)).dtype
        if after != before:
            raise ValueError(
                f"dtype={after} is not allowed: paged experts keep theirs, {before}; call model.unpage_experts() "
                "first, or page them after the change."
            )


def bank_shapes(experts: LayerExperts, factors: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[bool, BankShape]:
    """The shape of each bank that has experts; arguments as for `FactorStacks`."""
    (_, in_features), (out_features, _) = (half.shape for half in factors[0])
    shapes = {}
    for is_main in (True, False):
        members = experts.bank(is_main)
        if members:
            dtypes = dict.fromkeys(half.dtype for e in members for half in factors[e])
            dtype = functools.reduce(torch.promote_types, dtypes)
            shapes[is_main] = BankShape(experts.bank_rank(is_main), in_features, out_features, dtype)
    return shapes


class FactorStacks:
    """The factors of a layer's experts, side by side: of each bank an A (sum of ranks, I) and a B (O, sum of ranks).

    Made without values, so that factors can be put in one by one and dropped. A bank has the widest dtype of its
    experts.

    Args:
        experts (`LayerExperts`): the experts of the layer.
        factors (list of (A (r, I), B (O, r))): theirs, of which the dtypes and shapes are used; may be on meta.
        device (`torch.device` or `str`): where the stacks are made.
        store (`ExpertStore`, *optional*): where those banks are made that rest there.
        module (`str`): the module, as the store names it.
    """

    def __init__(
        self,
        experts: LayerExperts,
        factors: list[tuple[torch.Tensor, torch.Tensor]],
        device: torch.device | str = "cpu",
        store: ExpertStore | None = None,
        module: str = "",
    ) -> None:
        self.experts, self.store = experts, store
        self.banks: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}
        self.paged: list[bool] = []
        for is_main, (rank, in_features, out_features, dtype) in bank_shapes(experts, factors).items():
            if store is not None and store.holds(module, is_main):
                self.banks[is_main] = store.bank(module, is_main)
                self.paged.append(is_main)
                continue
            shapes = ((rank, in_features), (out_features, rank))
            self.banks[is_main] = tuple(torch.empty(shape, dtype=dtype, device=device) for shape in shapes)

    @torch.no_grad()
    def put(self, position: int, lora_A: torch.Tensor, lora_B: torch.Tensor) -> None:
        """Copy in the factors of the expert at this position of the model's `expert_names`."""
        is_main, ranks = self.experts.slots[position]
        stack_A, stack_B = self.banks[is_main]
        stack_A[ranks].copy_(lora_A)
        stack_B[:, ranks].copy_(lora_B)


def add_bank(
    layer: nn.Module,
    adapter_name: str,
    experts: LayerExperts,
    is_main: bool,
    stacks: FactorStacks | None,
    init_weights: bool | None,
) -> None:
    """Make one bank of a layer anew; an empty bank is left out."""
    containers = [getattr(layer, name) for name in BANKS[is_main]]
    for container in containers:
        if adapter_name in container:
            del container[adapter_name]
    members = experts.bank(is_main)
    if not members:
        return
    if stacks is not None:
        modules = [linear_from(stack, is_main in stacks.paged) for stack in stacks.banks[is_main]]
    else:
        rank = experts.bank_rank(is_main)
        shapes = ((layer.in_features, rank), (rank, layer.out_features))
        modules = [_empty_linear(*shape) for shape in shapes]
        _init_fresh(*modules, experts, members, init_weights)
    for container, module in zip(containers, modules, strict=True):
        container[adapter_name] = module


def linear_from(weight: torch.Tensor, is_paged: bool = False) -> nn.Linear:
    """A linear module around existing data; one that is paged is frozen.

    The parameter is put in its place directly: under `low_cpu_mem_usage=True` PEFT patches the registration of
    parameters so that it drops their data.
    """
    kind = PagedLinear if is_paged else nn.Linear
    module = kind(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module._parameters["weight"] = nn.Parameter(weight, requires_grad=not is_paged)
    return module


def _empty_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear module without values; on the meta device under `low_cpu_mem_usage=True`."""
    module = nn.Linear(in_features, out_features, bias=False, device="meta")
    module.weight = nn.Parameter(torch.empty(out_features, in_features))
    return module


def _init_fresh(lora_A: nn.Linear, lora_B: nn.Linear, experts: LayerExperts, members, init_weights) -> None:
    """Each expert as PEFT starts a LoRA: A Kaiming uniform, B zero (or as A, for tests); None: zeros to be loaded."""
    if lora_A.weight.device.type == "meta":
        return
    with torch.no_grad():
        if init_weights is None:
            lora_A.weight.zero_()
            lora_B.weight.zero_()
            return
        ranks = [experts.ranks[e] for e in members]
        for piece in lora_A.weight.split(ranks, dim=0):
            nn.init.kaiming_uniform_(piece, a=math.sqrt(5))
        for piece in lora_B.weight.split(ranks, dim=1):
            if init_weights:
                nn.init.zeros_(piece)
            else:
                nn.init.kaiming_uniform_(piece, a=math.sqrt(5))


def bank_fields(experts: LayerExperts, scale: float, device: torch.device) -> tuple:
    """(is_main, fields of `ExpertBank` beside the modules) of each bank that has experts.

    The tensors are made outside inference mode, so that a model used there first can still be trained.
    """
    banks = []
    with torch.inference_mode(False):
        for is_main in (True, False):
            members = experts.bank(is_main)
            if not members:
                continue
            fields = {
                "experts": members,
                "ranks": tuple(experts.ranks[e] for e in members),
                "scalings": tuple(experts.scalings[e] * scale for e in members),
            }
            constants = bank_constants(**fields, num_experts=len(experts.ranks), device=device)
            dropouts = tuple(experts.dropouts[e] for e in members)
            banks.append((is_main, {**fields, "dropouts": dropouts, "constants": constants}))
    return tuple(banks)


def join_banks(
    experts: LayerExperts, main: torch.Tensor | None, frozen: torch.Tensor | None, dim: int
) -> torch.Tensor | None:
    """One stack in routing order from the two banks' factors; `dim` is that of the rank (0 for A, 1 for B)."""
    if frozen is None or main is None:
        return main if frozen is None else frozen
    if main.device != frozen.device:  # the frozen ones are paged
        main, frozen = main.cpu(), frozen.cpu()
    pieces: dict[int, torch.Tensor] = {}
    for is_main, weight in ((True, main), (False, frozen)):
        members = experts.bank(is_main)
        pieces.update(zip(members, weight.split([experts.ranks[e] for e in members], dim=dim), strict=True))
    return torch.cat([pieces[e] for e in range(len(experts.ranks))], dim=dim)


def split_banks(experts: LayerExperts, stack: torch.Tensor, dim: int) -> dict[bool, torch.Tensor]:
    """The inverse of `join_banks`: the factors of each bank that has experts."""
    pieces = stack.split(list(experts.ranks), dim=dim)
    banks = {is_main: [pieces[e] for e in experts.bank(is_main)] for is_main in (True, False)}
    return {is_main: torch.cat(members, dim=dim) for is_main, members in banks.items() if members}
