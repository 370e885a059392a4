"""Tokens sorted by expert, one matmul an expert: for many tokens and many experts. Cost of `top_k` experts.

Where a bank has one rank and torch can, the matmuls of all experts are one call (`torch.nn.functional.grouped_mm`),
which reads no size from the device; otherwise they are a loop over the experts that have tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch

from .stack import ExpertBank, ExpertStack, dropped, local_index


# Assignments at a time where no gradient is needed: as many as tokens, but so many that calls are not the cost.
SMALLEST_PART = 256


def grouped(
    x_TI: torch.Tensor,
    stack: ExpertStack,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    aggregation: str,
    onto_TO: torch.Tensor | None = None,
) -> torch.Tensor:
    """Same result as `eager`; peak extra memory is (T, K, I + O), and (T, I + O) where no gradient is needed.

    Arguments as for `eager`, and `onto_TO`: where given, the result is added to it in place.
    """
    tokens = x_TI.shape[0]
    sorted_banks = [_SortedBank(bank, index_TK, weights_TK, x_TI.dtype) for bank in stack.banks]
    is_low = x_TI.dtype in (torch.bfloat16, torch.float16)
    y_TO = onto_TO
    if onto_TO is None or is_low:  # sums of several experts are rounded once
        y_TO = x_TI.new_zeros(tokens, stack.out_features, dtype=torch.float32 if is_low else None)
    _add_experts(y_TO, x_TI, stack, sorted_banks, aggregation)
    y_TO = y_TO.to(x_TI.dtype)
    return y_TO if onto_TO is None or not is_low else onto_TO.add_(y_TO)


def _add_experts(
    y_TO: torch.Tensor, x_TI: torch.Tensor, stack: ExpertStack, sorted_banks: list[_SortedBank], aggregation: str
) -> None:
    """Add the experts' outputs to `y_TO` in place."""
    tokens = x_TI.shape[0]
    if tokens == 0:
        return
    if aggregation == "output" and not torch.is_grad_enabled() and x_TI.device.type == "cpu":
        for one in sorted_banks:
            for part in one.parts(max(tokens, SMALLEST_PART)):
                delta_SO = part.expand(part.shrink(x_TI, stack.training) * part.gate_S1)
                y_TO.index_add_(0, part.token_S, delta_SO.to(y_TO.dtype))
        return
    whole = [one.whole() for one in sorted_banks]
    shrunk = [part.shrink(x_TI, stack.training) for part in whole]
    if aggregation == "parameter":
        mixed_Tr = x_TI.new_zeros(tokens, stack.banks[0].ranks[0])
        for part, z_Sr in zip(whole, shrunk, strict=True):
            mixed_Tr = mixed_Tr.index_add(0, part.token_S, z_Sr * part.weight_S1)
        shrunk = [mixed_Tr[part.token_S] for part in whole]
    for part, z_Sr in zip(whole, shrunk, strict=True):
        y_TO.index_add_(0, part.token_S, part.expand(z_Sr * part.gate_S1).to(y_TO.dtype))


class _SortedBank:
    """The assignments (token, expert) of a bank, sorted by expert; S = T x K.

    What is no expert of the bank is given to the bank's last expert with weight 0, so that every row is written.
    """

    def __init__(self, bank: ExpertBank, index_TK: torch.Tensor, weights_TK: torch.Tensor, dtype: torch.dtype) -> None:
        members = len(bank.experts)
        local_S = local_index(bank, index_TK).flatten()
        is_here_S = (local_S >= 0) & (local_S < members)
        self.local_S, order_S = torch.sort(torch.where(is_here_S, local_S, members - 1), stable=True)
        self.bank, self.token_S = bank, order_S // index_TK.shape[1]
        weight_S = (weights_TK.flatten() * is_here_S)[order_S]
        self.weight_S1 = weight_S.unsqueeze(-1).to(dtype)
        self.gate_S1 = (weight_S * bank.constants.scaling_MR[self.local_S, 0]).unsqueeze(-1).to(dtype)
        places_M = torch.arange(members, device=local_S.device)
        self.ends_M = torch.searchsorted(self.local_S, places_M, right=True)

    def whole(self) -> _Part:
        """All assignments."""
        total, members = self.local_S.shape[0], len(self.bank.experts)
        return self._part(0, total, slice(0, members))

    def parts(self, size: int) -> Iterator[_Part]:
        """The assignments of a few experts at a time: of `size`, or one expert. Reads from the device."""
        start, first = 0, 0
        ends = self.ends_M.tolist()
        for place, stop in enumerate(ends):
            is_last = place + 1 == len(ends)
            if stop > start and (is_last or ends[place + 1] - start > size):
                yield self._part(start, stop, slice(first, place + 1))
                start, first = stop, place + 1

    def _part(self, start: int, stop: int, members: slice) -> _Part:
        return _Part(
            self.bank,
            self.token_S[start:stop],
            self.local_S[start:stop],
            self.weight_S1[start:stop],
            self.gate_S1[start:stop],
            self.ends_M - start,
            members,
        )


class _Part:
    """Sorted assignments: token, expert, weight and gate of each, where each expert's end, and whose they are."""

    def __init__(self, bank, token_S, local_S, weight_S1, gate_S1, ends_M, members) -> None:
        self.bank, self.token_S, self.local_S, self.members = bank, token_S, local_S, members
        self.weight_S1, self.gate_S1, self.ends_M = weight_S1, gate_S1, ends_M
        self.rank = one_call_rank(bank)

    def shrink(self, x_TI: torch.Tensor, training: bool) -> torch.Tensor:
        """A_i x of each assignment, (S, largest rank)."""
        x_SI = x_TI.index_select(0, self.token_S)
        if training and any(self.bank.dropouts):
            x_SI = dropped(x_SI, torch.tensor(self.bank.dropouts, device=x_TI.device)[self.local_S])
        weight = self.bank.lora_A.weight
        if self.rank is not None:
            factors_MRI = weight.unflatten(0, (-1, self.rank))[self.members]
            if torch.is_grad_enabled():
                return self._one_call(x_SI, factors_MRI.transpose(1, 2))
            # factors first: CPUs multiply a low rank by many columns faster than many rows by a low rank
            return self._one_call(factors_MRI, x_SI.t()).t().contiguous()
        widest = max(self.bank.ranks)
        pieces = [x_SI[span] @ weight[columns].t() for span, columns in self._spans()]
        return torch.cat([torch.nn.functional.pad(z_Sr, (0, widest - z_Sr.shape[1])) for z_Sr in pieces])

    def expand(self, z_SR: torch.Tensor) -> torch.Tensor:
        """B_i z_i of each assignment, (S, O)."""
        weight = self.bank.lora_B.weight
        if self.rank is not None:
            return self._one_call(z_SR, weight.t().unflatten(0, (-1, self.rank))[self.members])
        return torch.cat(
            [z_SR[span, : columns.stop - columns.start] @ weight[:, columns].t() for span, columns in self._spans()]
        )

    def _one_call(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.grouped_mm(left, right, offs=self.ends_M[self.members].to(torch.int32))

    def _spans(self) -> Iterator[tuple[slice, slice]]:
        """(assignments, columns of the bank) of each expert that has assignments."""
        start, column = 0, sum(self.bank.ranks[: self.members.start])
        for stop, rank in zip(self.ends_M[self.members].tolist(), self.bank.ranks[self.members], strict=True):
            if stop > start:
                yield slice(start, stop), slice(column, column + rank)
            start, column = stop, column + rank


@torch.compiler.assume_constant_result
def has_grouped_mm(device_type: str, dtype: torch.dtype) -> bool:
    """Whether `grouped_mm` takes 2-D rows and 3-D factors of this dtype on this kind of device."""
    return _takes_grouped_mm(device_type, dtype)


@cache
def _takes_grouped_mm(device_type: str, dtype: torch.dtype) -> bool:
    rows, factors = (torch.ones(size, device=device_type, dtype=dtype) for size in ((2, 16), (1, 16, 16)))
    ends = torch.tensor([2], dtype=torch.int32, device=device_type)
    try:
        torch.nn.functional.grouped_mm(rows, factors, offs=ends)
    except RuntimeError:
        return False
    return True


def one_call_rank(bank: ExpertBank) -> int | None:
    """The rank of all experts of the bank if their matmuls can be one call: its strides are multiples of 16 bytes."""
    lora_A, lora_B, rank = bank.lora_A.weight, bank.lora_B.weight, bank.ranks[0]
    sizes = (rank, lora_A.shape[1], lora_B.shape[0], max(lora_B.stride()))
    is_aligned = all(size * lora_A.element_size() % 16 == 0 for size in sizes)
    is_one_call = bank.constants.is_one_rank and is_aligned and has_grouped_mm(lora_A.device.type, lora_A.dtype)
    return rank if is_one_call else None
