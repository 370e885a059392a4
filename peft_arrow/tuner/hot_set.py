"""The hot set of a layer: some of its paged experts in slots on the compute device, the least recently used replaced.

To a kernel the slots are a layer of their own: as many experts as slots, of one rank (shorter ones are filled up with
zeros), beside the experts that are not paged. So every kernel works on them as it is.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..ops import ExpertBank, ExpertStack, bank_constants, routed_lora
from .bank import PagedLinear, bank_modules, linear_from
from .prototype_state import fingerprint


if TYPE_CHECKING:
    from .layer import ArrowLoraLinear


# Choices that are read one by one; of more, the distinct ones are found on the device first.
FEW_CHOICES = 256


def paged_bank(layer: ArrowLoraLinear, adapter_name: str) -> bool | None:
    """Which bank of the layer is paged (True: the main one); None where none is."""
    experts = layer.experts[adapter_name]
    for is_main in (True, False):
        if experts.bank(is_main) and isinstance(bank_modules(layer, adapter_name, is_main)[0], PagedLinear):
            return is_main
    return None


def needs_slots(resting: torch.device, computing: torch.device) -> bool:
    """Whether experts have to be brought to where they are used: on a CPU the store itself is at hand."""
    return resting != computing


class HotSet:
    """The slots of a layer for one PEFT adapter; made at the first call, kept across calls.

    Args:
        size (`int`): how many experts lie in slots at most.
    """

    def __init__(self, size: int) -> None:
        self.size, self.lock = size, threading.Lock()
        self.slots: Slots | None = None

    def forget(self) -> None:
        """Give the slots' memory back."""
        self.slots = None

    def __getstate__(self) -> dict:
        return {"size": self.size}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["size"])

    @torch.compiler.disable
    def apply(
        self,
        layer: ArrowLoraLinear,
        adapter_name: str,
        x_TI: torch.Tensor,
        index_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        options: dict[str, str],
    ) -> torch.Tensor:
        """The weighted expert outputs (T, O); arguments as for `routed_lora`."""
        with self.lock:  # the slots of a call must not be replaced by another thread before it is done
            key = Slots.key_of(layer, adapter_name, x_TI.device)
            if self.slots is None or self.slots.key != key:
                self.slots = None
                self.slots = Slots(layer, adapter_name, self.size, x_TI.device)
            return _Call(layer, adapter_name, options).run(self.slots, x_TI, index_TK, weights_TK)


class Slots:
    """Room for `size` paged experts of a layer on a device, and what is in it.

    Attributes:
        slot_of (`OrderedDict[int, int]`): position in the layer -> slot, the least recently used first.
    """

    def __init__(self, layer: ArrowLoraLinear, adapter_name: str, size: int, device: torch.device) -> None:
        self.experts, is_main = layer.experts[adapter_name], paged_bank(layer, adapter_name)
        self.key = self.key_of(layer, adapter_name, device)
        self.members = self.experts.bank(is_main)
        self._member_set = frozenset(self.members)
        self.lora_A, self.lora_B = (half.weight for half in bank_modules(layer, adapter_name, is_main))
        self.scale, self.size = layer.scales[adapter_name], max(1, min(size, len(self.members)))
        self.slot_of: OrderedDict[int, int] = OrderedDict()
        self.free = list(range(self.size))[::-1]
        rank = max(self.experts.ranks[e] for e in self.members)
        with torch.inference_mode(False), torch.no_grad():
            made = {"dtype": self.lora_A.dtype, "device": device}
            self.A_HrI = torch.zeros(self.size, rank, self.lora_A.shape[1], **made)
            self.B_HrO = torch.zeros(self.size, rank, self.lora_B.shape[0], **made)
            self._make_banks(layer, adapter_name, not is_main, rank, device)

    @staticmethod
    def key_of(layer: ArrowLoraLinear, adapter_name: str, device: torch.device) -> tuple:
        """A value that changes with all that slots depend on."""
        halves = [half.weight for half in bank_modules(layer, adapter_name, paged_bank(layer, adapter_name))]
        return fingerprint(halves), layer.experts[adapter_name], layer.scales[adapter_name], device

    def _make_banks(self, layer, adapter_name: str, is_main: bool, rank: int, device: torch.device) -> None:
        """The slots as a bank; beside it the bank of the experts that are not paged."""
        self.others = others = self.experts.bank(is_main)
        self.num_experts = self.size + len(others)
        # with two more for E and -1, which stand for no expert
        places = [-1] * (len(self.experts.positions) + 2)
        for place, e in enumerate(others, self.size):
            places[e] = place
        self.place_E = torch.tensor(places, dtype=torch.int64, device=device)
        fields = {"experts": tuple(range(self.size)), "ranks": (rank,) * self.size, "scalings": (0.0,) * self.size}
        constants = bank_constants(**fields, num_experts=self.num_experts, device=device)
        halves = (self.A_HrI.flatten(0, 1), self.B_HrO.flatten(0, 1).t())
        linears = [linear_from(factors, is_paged=True) for factors in halves]
        self.bank = ExpertBank(*linears, **fields, dropouts=(0.0,) * self.size, constants=constants)
        self.resident: tuple[ExpertBank, ...] = ()
        if others:
            fields = {
                "experts": tuple(range(self.size, self.num_experts)),
                "ranks": tuple(self.experts.ranks[e] for e in others),
                "scalings": tuple(self.experts.scalings[e] * self.scale for e in others),
            }
            constants = bank_constants(**fields, num_experts=self.num_experts, device=device)
            dropouts = tuple(self.experts.dropouts[e] for e in others)
            modules = bank_modules(layer, adapter_name, is_main)
            self.resident = (ExpertBank(*modules, **fields, dropouts=dropouts, constants=constants),)

    def stack(self, layer: ArrowLoraLinear) -> ExpertStack:
        """What kernels take; experts are numbered by `place_E`."""
        return ExpertStack((self.bank, *self.resident), self.num_experts, layer.out_features, layer.training)

    def wanted(self, index_TK: torch.Tensor) -> list[int]:
        """The paged experts among the chosen, those in slots first; reads from the device."""
        few = index_TK.numel() <= FEW_CHOICES
        found = set((index_TK.flatten() if few else index_TK.unique()).tolist())
        return sorted(found & self._member_set, key=lambda e: (e not in self.slot_of, e))

    @torch.no_grad()
    def bring(self, experts: Sequence[int]) -> None:
        """Have these experts in slots; at most `size`."""
        missing = [e for e in experts if e not in self.slot_of]
        for e in experts:
            if e in self.slot_of:
                self.slot_of.move_to_end(e)
        gone, slots = [], []
        for e in missing:
            if self.free:
                slots.append(self.free.pop())
            else:
                expert, slot = self.slot_of.popitem(last=False)
                gone.append(expert)
                slots.append(slot)
            self.slot_of[e] = slots[-1]
            self._copy(e, slots[-1])
        if missing:
            self._tell(gone, missing, slots)

    def _copy(self, e: int, slot: int) -> None:
        _, columns = self.experts.slots[self.experts.positions[e]]
        rank = self.experts.ranks[e]
        halves = ((self.A_HrI, self.lora_A), (self.B_HrO, self.lora_B.t()))
        for slots_HrN, factors_RN in halves:
            slots_HrN[slot, :rank].copy_(factors_RN[columns], non_blocking=True)
            slots_HrN[slot, rank:].zero_()

    def _tell(self, gone: list[int], missing: list[int], slots: list[int]) -> None:
        """Where experts lie now, and the scalings of the slots."""
        device, tables = self.place_E.device, self.bank.constants
        moved = torch.tensor([[*gone, *missing], [-1] * len(gone) + slots], device=device)
        self.place_E[moved[0]] = moved[1]
        widest = self.A_HrI.shape[1]
        scaling = {e: self.experts.scalings[e] * self.scale for e in missing}
        rows = [[scaling[e]] * self.experts.ranks[e] + [0.0] * (widest - self.experts.ranks[e]) for e in missing]
        rows_Sr, slot_S = torch.tensor(rows, device=device), torch.tensor(slots, device=device)
        tables.scaling_MR[slot_S] = rows_Sr
        tables.scaling_R.view(self.size, widest)[slot_S] = rows_Sr
        scalings, dropouts = list(self.bank.scalings), list(self.bank.dropouts)
        for e, slot in zip(missing, slots, strict=True):
            scalings[slot], dropouts[slot] = scaling[e], self.experts.dropouts[e]
        self.bank = replace(self.bank, scalings=tuple(scalings), dropouts=tuple(dropouts))


class _Call:
    """One call of a layer with slots."""

    def __init__(self, layer: ArrowLoraLinear, adapter_name: str, options: dict[str, str]) -> None:
        self.layer, self.adapter_name, self.options = layer, adapter_name, options

    def run(self, slots: Slots, x_TI, index_TK, weights_TK) -> torch.Tensor:
        """All experts of a call at once where they have room, or part by part."""
        wanted = slots.wanted(index_TK)
        if self._needs_gradient(slots, x_TI, weights_TK):  # the backward needs the factors as they are now
            slots = Slots(self.layer, self.adapter_name, len(wanted), x_TI.device)
        if len(wanted) <= slots.size:
            slots.bring(wanted)
            return self._routed(slots, x_TI, slots.place_E[index_TK], weights_TK)
        if self.options["aggregation"] == "output":
            return self._by_groups(slots, wanted, x_TI, index_TK, weights_TK)
        if len(x_TI) == 1:  # mixed factors of one token need all of its experts at once
            slots = Slots(self.layer, self.adapter_name, len(wanted), x_TI.device)
            return self.run(slots, x_TI, index_TK, weights_TK)
        half = len(x_TI) // 2
        parts = [(x_TI[part], index_TK[part], weights_TK[part]) for part in (slice(half), slice(half, None))]
        return torch.cat([self.run(slots, *part) for part in parts])

    def _by_groups(self, slots: Slots, wanted: list[int], x_TI, index_TK, weights_TK) -> torch.Tensor:
        """As many experts as there are slots at a time; each assignment is computed as a token of its own."""
        is_low = x_TI.dtype in (torch.bfloat16, torch.float16)
        y_TO = x_TI.new_zeros(len(x_TI), self.layer.out_features, dtype=torch.float32 if is_low else None)
        groups = [wanted[start : start + slots.size] for start in range(0, len(wanted), slots.size)]
        pass_of = [-1] * len(slots.place_E)
        for e in slots.others:
            pass_of[e] = 0
        for number, group in enumerate(groups):
            for e in group:
                pass_of[e] = number
        pass_TK = torch.tensor(pass_of, device=x_TI.device)[index_TK]
        for number, group in enumerate(groups):
            slots.bring(group)
            token_S, chosen_S = (pass_TK == number).nonzero(as_tuple=True)
            place_S1 = slots.place_E[index_TK[token_S, chosen_S]].unsqueeze(1)
            weights_S1 = weights_TK[token_S, chosen_S].unsqueeze(1)
            delta_SO = self._routed(slots, x_TI[token_S], place_S1, weights_S1)
            y_TO.index_add_(0, token_S, delta_SO.to(y_TO.dtype))
        return y_TO.to(x_TI.dtype)

    def _routed(self, slots: Slots, x_TI, place_TK, weights_TK) -> torch.Tensor:
        return routed_lora(x_TI, slots.stack(self.layer), place_TK, weights_TK, **self.options)

    @staticmethod
    def _needs_gradient(slots: Slots, x_TI: torch.Tensor, weights_TK: torch.Tensor) -> bool:
        trained = [half.weight for bank in slots.resident for half in (bank.lora_A, bank.lora_B)]
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_TI, weights_TK, *trained))
