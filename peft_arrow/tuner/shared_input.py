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

from ..ops import (
    ScoringIndex,
    bagged,
    folded_gated,
    full_scores,
    gather_gated,
    routed_lora,
    scores_in_two_stages,
    scoring_index,
    shrink_token,
    sparse_gated,
    top_k_in_two_stages,
)
from ..routers import Routing
from .shared_plan import Plan, is_plain, make_plan


if TYPE_CHECKING:
    from .layer import ArrowLoraLinear


class Choice(NamedTuple):
    """What the modules of a group (G) chose for the tokens of one input.

    Args:
        plan (`Plan`): for which it was made.
        x (`torch.Tensor`): the input (..., I), and its version counter.
        index_GTK, weights_GTK (`torch.Tensor`): the chosen experts and their weights.
        gates_GTK (`torch.Tensor`, *optional*): weights times scalings, for the kernels that take those.
        columns_GTN (`torch.Tensor`, *optional*): the columns of the chosen experts, N = K x rank.
        gates_GTE (`torch.Tensor`, *optional*): weights times scalings of all experts.
        made (`Sequence[torch.Tensor]`, *optional*): what all experts, or the chosen ones, make of the input, weighted.
    """

    plan: Plan
    x: torch.Tensor
    version: int
    index_GTK: torch.Tensor
    weights_GTK: torch.Tensor
    gates_GTK: torch.Tensor | None
    columns_GTN: torch.Tensor | None
    gates_GTE: torch.Tensor | None
    made: Sequence[torch.Tensor] | None


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
        self._indexed: tuple[Plan, ScoringIndex] | None = None

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
        if layer.recorder is not None:
            routing = Routing(choice.index_GTK[place], choice.weights_GTK[place])
            layer.recorder(layer, self.adapter_name, routing, x.shape[:-1])
        if not _is_private(layer, result):
            result = result.clone(memory_format=torch.contiguous_format)
        self._apply(choice, place, x.reshape(-1, x.shape[-1]), result.view(-1, layer.out_features))
        return result

    def _apply(self, choice: Choice, place: int, x_TI: torch.Tensor, onto_TO: torch.Tensor) -> None:
        """Add what the chosen experts of a module make of the input."""
        stack = choice.plan.stacks[place]
        bank = stack.banks[0]
        if choice.made is not None and choice.columns_GTN is None:
            onto_TO.addmm_(choice.made[place], bank.lora_B.weight.t())
        elif choice.made is not None:
            onto_TO.add_(bagged(choice.made[place], bank.lora_B.weight, choice.columns_GTN[place]))
        elif choice.gates_GTE is not None:
            folded_gated(x_TI, bank, choice.gates_GTE[place], onto_TO)
        elif choice.columns_GTN is not None:
            sparse_gated(x_TI, bank, choice.columns_GTN[place], choice.gates_GTK[place], onto_TO)
        elif choice.gates_GTK is not None:
            gather_gated(x_TI, bank, choice.index_GTK[place], choice.gates_GTK[place], onto_TO)
        else:
            options = {"aggregation": "output", "kernel": "auto", "onto_TO": onto_TO}
            routed_lora(x_TI, stack, choice.index_GTK[place], choice.weights_GTK[place], **options)

    def _applies(self, place: int, layer: ArrowLoraLinear, x: torch.Tensor, result: torch.Tensor) -> bool:
        """Whether this path is right for the call; afterwards there is a plan."""
        if (
            self.is_refused
            or layer.kernels[self.adapter_name] != "auto"
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
            self.plan = self._new_plan()
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
        groups, num_experts = len(plan.prototypes), plan.stacks[0].num_experts
        x_TI, num_chosen = x.reshape(-1, x.shape[-1]), min(selection.top_k, num_experts)
        z_TN = None
        if plan.calibration is None and scores_in_two_stages(
            len(x_TI), num_experts, x.shape[-1], num_chosen, x.device
        ):
            top_GTK, index_GTK = top_k_in_two_stages(x_TI, self._index(plan), num_chosen)[:2]
        else:
            if plan.joined is not None:
                z_TN = torch.mm(x_TI, plan.joined.t())
                logits_GTE = z_TN[:, : groups * num_experts].abs().view(-1, groups, num_experts).transpose(0, 1)
            else:
                logits_GTE = full_scores(x_TI, [linear.weight for linear in plan.prototypes])
            if plan.calibration is not None:
                mean_G1E, spread_G1E = plan.calibration
                logits_GTE.sub_(mean_G1E).div_(spread_G1E)
            top_GTK, index_GTK = torch.topk(logits_GTE, num_chosen, dim=-1)
        if selection.temperature != 1.0:
            top_GTK = (top_GTK - top_GTK[..., :1]).div_(max(selection.temperature, torch.finfo(torch.float32).tiny))
        weights_GTK = torch.softmax(top_GTK, dim=-1)
        return Choice(plan, x, version, index_GTK, weights_GTK, *_prepared(plan, x_TI, z_TN, index_GTK, weights_GTK))

    def _index(self, plan: Plan) -> ScoringIndex:
        """The prototypes as scoring in two stages takes them, made when they are first needed."""
        if self._indexed is None or self._indexed[0] is not plan:
            self._indexed = plan, scoring_index([linear.weight for linear in plan.prototypes])
        return self._indexed[1]

    def _new_plan(self) -> Plan | None:
        self.is_refused = not all(is_plain(member, self.adapter_name) for member in self.members)
        return None if self.is_refused else make_plan(self.members, self.adapter_name)


def _prepared(
    plan: Plan, x_TI: torch.Tensor, z_TN: torch.Tensor | None, index_GTK: torch.Tensor, weights_GTK: torch.Tensor
) -> tuple:
    """The last fields of a `Choice`, from what `plan.joined` made of the input."""
    groups, tokens = index_GTK.shape[:2]
    if not plan.takes_gates(tokens):
        return None, None, None, None
    gates_GTK = weights_GTK * plan.scaling
    if plan.is_folded:
        gates_GTE = gates_GTK.new_zeros(groups, tokens, plan.stacks[0].num_experts).scatter_(2, index_GTK, gates_GTK)
        if z_TN is None:
            return gates_GTK, None, gates_GTE, None
        z_TGER = z_TN[:, groups * gates_GTE.shape[2] :].view(tokens, groups, gates_GTE.shape[2], len(plan.columns_R))
        z_TGER.mul_(gates_GTE.transpose(0, 1).unsqueeze(-1))
        return gates_GTK, None, gates_GTE, z_TGER.flatten(2).unbind(1)
    if not plan.can_sparse:
        return gates_GTK, None, None, None
    columns_GTN = (index_GTK.unsqueeze(-1) * len(plan.columns_R) + plan.columns_R).flatten(2)
    if tokens > 1:
        return gates_GTK, columns_GTN, None, None
    banks = [stack.banks[0] for stack in plan.stacks]
    return gates_GTK, columns_GTN, None, shrink_token(x_TI, banks, index_GTK.squeeze(1), gates_GTK.squeeze(1))


def shared_inputs(groups: Sequence[Sequence[ArrowLoraLinear]], adapter_name: str) -> list[SharedInput]:
    """One object a group; a group whose modules have different experts is taken apart."""
    made = []
    for group in groups:
        is_one = len({member.experts[adapter_name].positions for member in group}) == 1
        made += [SharedInput(part, adapter_name) for part in ([group] if is_one else [[member] for member in group])]
    return made


def _is_private(layer: ArrowLoraLinear, result: torch.Tensor) -> bool:
    """Whether the base's output was made for this call and seen by nobody."""
    base = layer.base_layer
    return type(base) in (nn.Linear, Conv1D) and not base._forward_hooks and result.is_contiguous()
