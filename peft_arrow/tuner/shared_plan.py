"""What the short way through inference prepares once: the modules' weights, as it takes them.

`SharedInput` asks for a plan, and for another when a weight or a setting has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from ..ops import FOLDED_RANK, ExpertStack, folds, gathers, is_for_sparse, is_materialised
from ..routers import ArrowRouter
from .expert_layout import lay_out_by_expert
from .prototype_state import optimizer_steps


if TYPE_CHECKING:
    from .layer import ArrowLoraLinear


class Plan(NamedTuple):
    """What is the same in every call of a group of modules (G) that share an input.

    Args:
        stacks (`tuple[ExpertStack, ...]`): of each module.
        prototypes (`tuple[nn.Linear, ...]`): of each module.
        is_folded (`bool`): whether all experts are computed and weighed, and not the chosen ones alone.
        joined (`torch.Tensor`, *optional*):
            (G x E + G x R, I), a copy of the prototypes and of the factors A of all modules, where `is_folded`, R is
            small, and all are float32: one product then gives the logits and what the experts make of the input.
        scaling (`float`, *optional*): of all experts in all modules, where they have one, and one rank, and one bank.
        columns_R (`torch.Tensor`, *optional*): 0, 1, ... up to that rank.
        chosen_rank (`int`): sum of the ranks of a token's experts, the largest of all modules.
        can_sparse (`bool`): whether the kernel `sparse` can run.
        calibration (`tuple`, *optional*): mean and spread, (G, 1, E) each.
        seen (`list`): of each module (linear map, its weight, version counter, address), for which the plan is right.
        steps (`int`): of optimizers, when the plan was made.
        dtype (`torch.dtype`): of the factors.
    """

    stacks: tuple[ExpertStack, ...]
    prototypes: tuple[nn.Linear, ...]
    is_folded: bool
    joined: torch.Tensor | None
    scaling: float | None
    columns_R: torch.Tensor | None
    chosen_rank: int
    can_sparse: bool
    calibration: tuple[torch.Tensor, torch.Tensor] | None
    seen: list[list[tuple[nn.Linear, torch.Tensor, int | None, int]]]
    steps: int
    dtype: torch.dtype

    def is_current(self, place: int) -> bool:
        """Whether the weights of a module are those that the plan was made for."""
        for linear, weight, version, address in self.seen[place]:
            if linear._parameters["weight"] is not weight or weight.data_ptr() != address:
                return False
            if version is not None and weight._version != version:
                return False
        return self.steps == optimizer_steps() or not self.trains(place)

    def trains(self, place: int) -> bool:
        """Whether a weight of a module requires a gradient now."""
        return any(weight.requires_grad for _, weight, _, _ in self.seen[place])

    def takes_gates(self, tokens: int) -> bool:
        """Whether a kernel runs that takes weights times scalings."""
        does = self.is_folded or self.can_sparse or gathers(tokens, self.chosen_rank)
        return does and self.scaling is not None


@torch.no_grad()
def make_plan(members: Sequence[ArrowLoraLinear], name: str) -> Plan | None:
    """The plan of modules that share an input, for the PEFT adapter `name`; None if their weights are not at hand."""
    prototypes = tuple(member.arrow_lora_router[name] for member in members)
    device = prototypes[0].weight.device
    stacks = tuple(member.stack(name, device) for member in members)
    linears = [linear for stack in stacks for linear in _linears(stack)]
    weights = [linear.weight for linear in (*prototypes, *linears)]
    if not is_materialised(*weights) or any(weight.device != device for weight in weights):
        return None
    if any(_is_offloaded(module) for member in members for module in member.modules()):
        return None
    num_chosen = members[0].routers[name].width(stacks[0].num_experts)
    is_folded = all(folds(stack, num_chosen, has_gradients=False) for stack in stacks)
    if not is_folded:
        lay_out_by_expert([bank.lora_B for stack in stacks for bank in stack.banks])
    for member in members:
        member.check_prototypes(name)
    calibration, calibrated = None, ()
    if members[0].routers[name].selection.calibrated:
        calibrated = tuple(member.stored_rows("calibration")[name] for member in members)
        stored = torch.stack([linear.weight for linear in calibrated])
        calibration = stored[..., 0].unsqueeze(1), stored[..., 1].unsqueeze(1)
    seen = [
        [(linear, *_state(linear.weight)) for linear in (prototype, *_linears(stack), *calibrated)]
        for prototype, stack in zip(prototypes, stacks, strict=True)
    ]
    scaling, dtype = _only_scaling(stacks), linears[0].weight.dtype
    # a copy is for few weights, and for those that tell when they change
    can_join = is_folded and scaling is not None and all(stack.rank <= FOLDED_RANK for stack in stacks)
    can_join = can_join and all(weight.dtype == torch.float32 and _is_told_of(weight) for weight in weights)
    return Plan(
        stacks=stacks,
        prototypes=prototypes,
        is_folded=is_folded,
        joined=_joined(stacks, prototypes) if can_join else None,
        scaling=scaling,
        columns_R=None if scaling is None else torch.arange(stacks[0].banks[0].ranks[0], device=device),
        chosen_rank=num_chosen * max(bank.ranks[0] for stack in stacks for bank in stack.banks),
        can_sparse=is_for_sparse(device, dtype) and all(stack.lies_by_expert() for stack in stacks),
        calibration=calibration,
        seen=seen,
        steps=optimizer_steps(),
        dtype=dtype,
    )


def _joined(stacks: Sequence[ExpertStack], prototypes: Sequence[nn.Linear]) -> torch.Tensor:
    linears = [*prototypes, *(stack.banks[0].lora_A for stack in stacks)]
    with torch.inference_mode(False), torch.no_grad():
        return torch.cat([linear.weight for linear in linears])


def _only_scaling(stacks: Sequence[ExpertStack]) -> float | None:
    """The scaling of all experts, where each stack is one bank, and all experts have one scaling and one rank."""
    if any(len(stack.banks) > 1 for stack in stacks):
        return None
    ranks = {rank for stack in stacks for rank in stack.banks[0].ranks}
    scalings = {scaling for stack in stacks for scaling in stack.banks[0].scalings}
    return scalings.pop() if len(scalings) == len(ranks) == 1 else None


def _linears(stack: ExpertStack) -> list[nn.Linear]:
    return [linear for bank in stack.banks for linear in (bank.lora_A, bank.lora_B)]


def _is_told_of(weight: torch.Tensor) -> bool:
    """Whether a change of the weight is seen: not of inference mode, and no view into what FSDP gathers."""
    return isinstance(weight, nn.Parameter) and not weight.is_inference() and not weight._is_view()


def _state(weight: torch.Tensor) -> tuple[torch.Tensor, int | None, int]:
    """The weight, its version counter, which tensors of inference mode do not have, and its address."""
    return weight, None if weight.is_inference() else weight._version, weight.data_ptr()


def _is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate brings the weights in for each call."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(one, "offload", False) for one in (hook, *getattr(hook, "hooks", ())))


def is_plain(layer: ArrowLoraLinear, adapter_name: str) -> bool:
    """Whether the layer's settings are those of the short way."""
    router, positions = layer.routers[adapter_name], layer.experts[adapter_name].positions
    selection, masked = router.selection, layer.masked.get(adapter_name, frozenset())
    return (
        type(router) is ArrowRouter
        and selection.granularity == "token"
        and selection.null_expert is None
        and selection.top_p is None
        and not selection.tied
        and not masked.intersection(positions)
        and layer.aggregations[adapter_name] == "output"
        and layer.prototype_states[adapter_name].local is None
        and not layer.uses_slots(adapter_name, layer.arrow_lora_router[adapter_name].weight.device)
    )
