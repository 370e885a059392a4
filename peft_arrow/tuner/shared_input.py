"""Arrow at inference in few calls: modules that share an input choose their experts at once.

The general path of a layer gives the same numbers with more calls. This one is taken where no gradient is needed,
tokens are routed by Arrow's plain selection, and the weights are at hand.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..ops import ExpertStack, folded_gated, folds, gather_gated, gathers, is_materialised, routed_lora
from ..routers import ArrowRouter, Routing
from .prototype_state import optimizer_steps


if TYPE_CHECKING:
    from .layer import ArrowLoraLinear


class Choice(NamedTuple):
    """What the modules of a group (G) chose for the tokens of one input."""

    plan: Plan
    x: torch.Tensor
    version: int
    index_GTK: torch.Tensor
    weights_GTK: torch.Tensor
    gates_GTK: torch.Tensor | None
    gates_GTE: torch.Tensor | None


class Plan(NamedTuple):
    """What is the same in every call.

    Args:
        stacks (`tuple[ExpertStack, ...]`): of each module.
        prototypes (`tuple[nn.Linear, ...]`): of each module.
        is_folded (`bool`): whether all experts are computed and weighed, and not the chosen ones alone.
        scaling (`float`, *optional*): of all experts in all modules, where each module has one bank of one rank.
        chosen_rank (`int`): sum of the ranks of a token's experts, the largest of all modules.
        calibration (`tuple`, *optional*): mean and spread, (G, 1, E) each.
        seen (`list`): of each module (linear map, its weight, version counter), for which the prototypes are right.
        steps (`int`): of optimizers, when the plan was made.
        dtype (`torch.dtype`): of the factors.
    """

    stacks: tuple[ExpertStack, ...]
    prototypes: tuple[nn.Linear, ...]
    is_folded: bool
    scaling: float | None
    chosen_rank: int
    calibration: tuple[torch.Tensor, torch.Tensor] | None
    seen: list[list[tuple[nn.Linear, torch.Tensor, int | None]]]
    steps: int
    dtype: torch.dtype

    def is_current(self, place: int) -> bool:
        """Whether the weights of a module are those that the plan was made for."""
        for linear, weight, version in self.seen[place]:
            if linear._parameters["weight"] is not weight or (version is not None and weight._version != version):
                return False
        return self.steps == optimizer_steps() or not self.trains(place)

    def trains(self, place: int) -> bool:
        """Whether a weight of a module requires a gradient now."""
        return any(weight.requires_grad for _, weight, _ in self.seen[place])


class SharedInput:
    """The modules that get one input, for one PEFT adapter; the first of them decides for all.

    Args:
        members (`Sequence[ArrowLoraLinear]`): with the same experts, in the order in which the base calls them.
        adapter_name (`str`): the PEFT adapter.
    """

    def __init__(self, members: Sequence[ArrowLoraLinear], adapter_name: str) -> None:
        self.members, self.adapter_name = tuple(members), adapter_name
        self.places = {id(member): place for place, member in enumerate(self.members)}
        self.forget()

    def forget(self) -> None:
        """Drop what was made from the weights and settings."""
        self.plan: Plan | None = None
        self.is_refused = False
        self._choices: dict[int, Choice] = {}

    def __getstate__(self) -> dict:
        return {"members": self.members, "adapter_name": self.adapter_name}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["members"], state["adapter_name"])

    def add(self, layer: ArrowLoraLinear, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor | None:
        """Add the routed update of a layer to the base's output, in place where nobody else can see that.

        Returns:
            The sum, or None where this path does not apply.
        """
        place = self.places.get(id(layer))  # a replica of a layer is not a member
        if place is None or not self._applies(place, layer, x, result):
            return None
        plan = self.plan
        choice = self._choice(plan, place, x)
        index_TK, weights_TK = choice.index_GTK[place], choice.weights_GTK[place]
        if layer.recorder is not None:
            layer.recorder(layer, self.adapter_name, Routing(index_TK, weights_TK), x.shape[:-1])
        if not _is_private(layer, result):
            result = result.clone(memory_format=torch.contiguous_format)
        x_TI, onto_TO = x.reshape(-1, x.shape[-1]), result.view(-1, layer.out_features)
        stack = plan.stacks[place]
        if choice.gates_GTE is not None:
            folded_gated(x_TI, stack.banks[0], choice.gates_GTE[place], onto_TO)
        elif choice.gates_GTK is not None:
            gather_gated(x_TI, stack.banks[0], index_TK, choice.gates_GTK[place], onto_TO)
        else:
            options = {"aggregation": "output", "kernel": "auto", "onto_TO": onto_TO}
            routed_lora(x_TI, stack, index_TK, weights_TK, **options)
        return result

    def _applies(self, place: int, layer: ArrowLoraLinear, x: torch.Tensor, result: torch.Tensor) -> bool:
        """Whether this path is right for the call; afterwards there is a plan."""
        if (
            self.is_refused
            or torch.jit.is_tracing()
            or layer.training
            or layer.gating is not None
            or type(x) is not torch.Tensor
            or type(result) is not torch.Tensor
            or result.dtype != x.dtype
            or not x.numel()
            or torch.compiler.is_compiling()
            or torch._C._functorch.peek_interpreter_stack() is not None
            or torch.is_autocast_enabled(x.device.type)
        ):
            return False
        # the first module of a group looks after all, each other one after itself
        places = range(len(self.members)) if place == 0 else (place,)
        if self.plan is None or not all(map(self.plan.is_current, places)):
            self.plan = self._make_plan()
        if self.plan is None or self.plan.dtype != x.dtype:
            return False
        return not (torch.is_grad_enabled() and (x.requires_grad or result.requires_grad or self.plan.trains(place)))

    def _choice(self, plan: Plan, place: int, x: torch.Tensor) -> Choice:
        """The choice of all members for this input, made by the first of them that sees it."""
        thread, version = threading.get_ident(), -1 if x.is_inference() else x._version
        known = self._choices.get(thread)
        is_known = known is not None and known.plan is plan and known.x is x and known.version == version >= 0
        if not is_known:
            known = self._choose(plan, x, version)
        if place == len(self.members) - 1:
            self._choices.pop(thread, None)
        elif version >= 0:  # a tensor of inference mode does not tell whether it was changed in between
            self._choices[thread] = known
        return known

    def _choose(self, plan: Plan, x: torch.Tensor, version: int) -> Choice:
        selection = self.members[0].routers[self.adapter_name].selection
        num_experts = plan.stacks[0].num_experts
        x_TI = x.reshape(-1, x.shape[-1])
        x_TI = x_TI if x_TI.dtype == torch.float32 else x_TI.float()
        logits_GTE = x_TI.new_empty(len(plan.prototypes), x_TI.shape[0], num_experts)
        for logits_TE, linear in zip(logits_GTE, plan.prototypes, strict=True):
            torch.mm(x_TI, linear.weight.t(), out=logits_TE)
        logits_GTE.abs_()
        if plan.calibration is not None:
            mean_G1E, spread_G1E = plan.calibration
            logits_GTE.sub_(mean_G1E).div_(spread_G1E)
        top_GTK, index_GTK = torch.topk(logits_GTE, min(selection.top_k, num_experts), dim=-1)
        if selection.temperature != 1.0:
            top_GTK = (top_GTK - top_GTK[..., :1]).div_(max(selection.temperature, torch.finfo(torch.float32).tiny))
        weights_GTK = torch.softmax(top_GTK, dim=-1)
        gates_GTK = gates_GTE = None
        if plan.scaling is not None and (plan.is_folded or gathers(x_TI.shape[0], plan.chosen_rank)):
            gates_GTK = weights_GTK * plan.scaling
            if plan.is_folded:
                gates_GTE = logits_GTE.zero_().scatter_(2, index_GTK, gates_GTK)
        return Choice(plan, x, version, index_GTK, weights_GTK, gates_GTK, gates_GTE)

    @torch.no_grad()
    def _make_plan(self) -> Plan | None:
        name = self.adapter_name
        self.is_refused = not all(_is_plain(member, name) for member in self.members)
        if self.is_refused:
            return None
        prototypes = tuple(member.arrow_lora_router[name] for member in self.members)
        device = prototypes[0].weight.device
        stacks = tuple(member.stack(name, device) for member in self.members)
        linears = [linear for stack in stacks for linear in _linears(stack)]
        weights = [linear.weight for linear in (*prototypes, *linears)]
        if not is_materialised(*weights) or any(weight.device != device for weight in weights):
            return None
        if any(_is_offloaded(module) for member in self.members for module in member.modules()):
            return None
        num_chosen = self.members[0].routers[name].width(stacks[0].num_experts)
        is_folded = all(folds(stack, num_chosen) for stack in stacks)
        if not is_folded:
            lay_out_by_expert([bank.lora_B for stack in stacks for bank in stack.banks])
        for member in self.members:
            member.check_prototypes(name)
        calibration, calibrated = None, ()
        if self.members[0].routers[name].selection.calibrated:
            calibrated = tuple(member.stored_rows("calibration")[name] for member in self.members)
            stored = torch.stack([linear.weight for linear in calibrated])
            calibration = stored[..., 0].unsqueeze(1), stored[..., 1].unsqueeze(1)
        seen = [
            [(linear, linear.weight, _version(linear.weight)) for linear in (prototype, *_linears(stack), *calibrated)]
            for prototype, stack in zip(prototypes, stacks, strict=True)
        ]
        return Plan(
            stacks=stacks,
            prototypes=prototypes,
            is_folded=is_folded,
            scaling=_only_scaling(stacks),
            chosen_rank=num_chosen * max(bank.ranks[0] for stack in stacks for bank in stack.banks),
            calibration=calibration,
            seen=seen,
            steps=optimizer_steps(),
            dtype=linears[0].weight.dtype,
        )


def shared_inputs(groups: Sequence[Sequence[ArrowLoraLinear]], adapter_name: str) -> list[SharedInput]:
    """One object a group; a group whose modules have different experts is taken apart."""
    made = []
    for group in groups:
        is_one = len({member.experts[adapter_name].positions for member in group}) == 1
        made += [SharedInput(part, adapter_name) for part in ([group] if is_one else [[member] for member in group])]
    return made


def _only_scaling(stacks: Sequence[ExpertStack]) -> float | None:
    """The scaling of all experts, where each stack is one bank of one rank and they have one scaling."""
    if any(len(stack.banks) > 1 or not stack.banks[0].constants.is_one_rank for stack in stacks):
        return None
    scalings = {scaling for stack in stacks for scaling in stack.banks[0].scalings}
    return scalings.pop() if len(scalings) == 1 else None


def _linears(stack: ExpertStack) -> list[nn.Linear]:
    return [linear for bank in stack.banks for linear in (bank.lora_A, bank.lora_B)]


def _version(tensor: torch.Tensor) -> int | None:
    """The version counter, which tensors of inference mode do not have."""
    return None if tensor.is_inference() else tensor._version


def _is_offloaded(module: nn.Module) -> bool:
    """Whether a hook of accelerate brings the weights in for each call."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(one, "offload", False) for one in (hook, *getattr(hook, "hooks", ())))


def lay_out_by_expert(linears: Sequence[nn.Linear]) -> None:
    """Change how frozen weights (O, R) lie in memory, and nothing else: as (R, O), so that an expert is one piece.

    In the usual order an expert has a few bytes in each of O rows, and reading one of a thousand is slow. Weights that
    train keep theirs, because FSDP takes no others.
    """
    for linear in linears:
        weight = linear.weight
        if weight.is_contiguous() and not weight.requires_grad:
            with torch.inference_mode(weight.is_inference()):
                weight.data = weight.data.t().contiguous().t()


def _is_plain(layer: ArrowLoraLinear, adapter_name: str) -> bool:
    """Whether the layer's settings are those of this path."""
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
        and layer.kernels[adapter_name] == "auto"
        and layer.prototype_states[adapter_name].local is None
        and not layer.uses_slots(adapter_name, layer.arrow_lora_router[adapter_name].weight.device)
    )


def _is_private(layer: ArrowLoraLinear, result: torch.Tensor) -> bool:
    """Whether the base's output was made for this call and seen by nobody."""
    base = layer.base_layer
    return type(base) in (nn.Linear, Conv1D) and not base._forward_hooks and result.is_contiguous()
