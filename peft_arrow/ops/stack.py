"""What a kernel is given: the experts of one layer, stacked.

Shape letters used in the package: T tokens (batch and sequence flattened), E experts of the layer, K chosen experts
per token, R sum of the ranks of a bank, M experts of a bank, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


PLAIN = (torch.Tensor, nn.Parameter)


@dataclass(frozen=True)
class ExpertBank:
    """Experts of one layer whose factors lie concatenated in two linear modules.

    Args:
        lora_A (`nn.Linear`): weight (R, I); the rows of each expert are adjacent.
        lora_B (`nn.Linear`): weight (O, R); the columns of each expert are adjacent.
        experts (`tuple[int, ...]`): the position of each expert of the bank among the E experts of the layer.
        ranks (`tuple[int, ...]`): the rank of each expert of the bank.
        scalings (`tuple[float, ...]`): alpha / r, or alpha / sqrt(r) with rslora, of each expert of the bank.
        dropouts (`tuple[float, ...]`): the dropout probability on the input of each expert; only used in training.
        constants (`BankConstants`): what of it kernels need as tensors.
    """

    lora_A: nn.Linear
    lora_B: nn.Linear
    experts: tuple[int, ...]
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    dropouts: tuple[float, ...]
    constants: BankConstants


@dataclass(frozen=True)
class BankConstants:
    """What does not change between calls, as tensors on the device of the layer.

    Padding, and the last row of each table, stand for no expert: their scaling is 0.

    Args:
        owner_R (`torch.Tensor`): int64 (R,), for each column its expert's position in the layer.
        scaling_R (`torch.Tensor`): float32 (R,), for each column its expert's scaling.
        local_E (`torch.Tensor`, *optional*):
            int64 (E + 2,), for a position in the layer that in the bank, M for an expert of another bank; the entries
            E (null expert) and -1 (nothing) are M. None where the bank has all experts in order.
        columns_MR (`torch.Tensor`): int64 (M + 1, largest rank), the columns of each expert of the bank.
        scaling_MR (`torch.Tensor`): float32 (M + 1, largest rank), their scalings.
        rank (`int`): R.
        is_one_rank (`bool`): whether all experts of the bank have one rank.
    """

    owner_R: torch.Tensor
    scaling_R: torch.Tensor
    local_E: torch.Tensor | None
    columns_MR: torch.Tensor
    scaling_MR: torch.Tensor
    rank: int
    is_one_rank: bool


@dataclass(frozen=True)
class ExpertStack:
    """All experts of one layer, in at most two banks (trainable and frozen).

    Args:
        banks (`tuple[ExpertBank, ...]`): disjoint, together all experts of the layer.
        num_experts (`int`): E.
        out_features (`int`): O.
        training (`bool`): whether dropout is on.
    """

    banks: tuple[ExpertBank, ...]
    num_experts: int
    out_features: int
    training: bool = False

    @property
    def rank(self) -> int:
        """The sum of the ranks of all experts."""
        return sum(bank.constants.rank for bank in self.banks)

    def is_whole(self) -> bool:
        """Whether the factors are at hand as they are: not on the meta device, not sharded, not emptied."""
        return is_materialised(*(linear.weight for bank in self.banks for linear in (bank.lora_A, bank.lora_B)))

    def lies_by_expert(self) -> bool:
        """Whether each expert's columns of B are one piece in memory, as kernels that read single experts like it."""
        return all(bank.lora_B.weight.t().is_contiguous() for bank in self.banks)


def is_materialised(*weights: torch.Tensor) -> bool:
    """Whether the weights are plain tensors with data: not on the meta device, not shards, not fakes."""
    return all(type(w) in PLAIN and w.device.type != "meta" and w.numel() > 0 for w in weights)


def bank_constants(
    experts: tuple[int, ...],
    ranks: tuple[int, ...],
    scalings: tuple[float, ...],
    num_experts: int,
    device: torch.device | str | None = None,
) -> BankConstants:
    """The tables of a bank; arguments as for [`ExpertBank`] and [`ExpertStack`]."""
    owner = [e for e, rank in zip(experts, ranks, strict=True) for _ in range(rank)]
    widest = max(ranks)
    columns, scales, start = [], [], 0
    for rank, scaling in zip(ranks, scalings, strict=True):
        columns.append([*range(start, start + rank), *([start] * (widest - rank))])
        scales.append([scaling] * rank + [0.0] * (widest - rank))
        start += rank
    local = None
    if experts != tuple(range(num_experts)):
        places = {e: place for place, e in enumerate(experts)}
        local = [places.get(e, len(experts)) for e in range(num_experts + 2)]
    flat = [scaling for rank, scaling in zip(ranks, scalings, strict=True) for _ in range(rank)]
    return BankConstants(
        owner_R=torch.tensor(owner, dtype=torch.int64, device=device),
        scaling_R=torch.tensor(flat, dtype=torch.float32, device=device),
        local_E=None if local is None else torch.tensor(local, dtype=torch.int64, device=device),
        columns_MR=torch.tensor([*columns, [0] * widest], dtype=torch.int64, device=device),
        scaling_MR=torch.tensor([*scales, [0.0] * widest], dtype=torch.float32, device=device),
        rank=len(flat),
        is_one_rank=min(ranks) == widest,
    )


def local_index(bank: ExpertBank, index_TK: torch.Tensor) -> torch.Tensor:
    """Positions in the bank, int64 (T, K), for positions in the layer; M, or -1 in a bank of all, for no expert."""
    local_E = bank.constants.local_E
    return index_TK if local_E is None else local_E[index_TK]


def dense_weights(index_TK: torch.Tensor, weights_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """float32 (T, E), 0 where an expert is not chosen."""
    # one more column takes what goes to no expert; a negative index is that column too
    weights_TE = weights_TK.new_zeros(index_TK.shape[0], num_experts + 1)
    return weights_TE.scatter(1, index_TK.remainder(num_experts + 1), weights_TK)[:, :num_experts]


def shrink(x_TI: torch.Tensor, bank: ExpertBank, training: bool) -> torch.Tensor:
    """Rank-space activations of every expert of the bank: (T, I) -> (T, R).

    Experts with different dropout probabilities see independently dropped inputs, as separate LoRA layers would.
    """
    dropouts = bank.dropouts if training else ()
    distinct = sorted(set(dropouts))
    if not distinct or distinct == [0.0]:
        return bank.lora_A(x_TI)
    z_TR = None
    for p in distinct:
        dropped_TR = bank.lora_A(nn.functional.dropout(x_TI, p, training=True))
        if z_TR is None:
            z_TR = dropped_TR
        else:
            mine_R = torch.repeat_interleave(
                torch.tensor([q == p for q in dropouts], device=x_TI.device),
                torch.tensor(bank.ranks, device=x_TI.device),
            )
            z_TR = torch.where(mine_R, dropped_TR, z_TR)
    return z_TR


def dropped(x: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """Dropout with a probability of its own for each row of the last dimension; a probability of 1 leaves nothing."""
    kept = 1.0 - rates.unsqueeze(-1)
    mask = torch.rand(x.shape, device=x.device) < kept
    return x * (mask / kept.clamp_min(torch.finfo(torch.float32).tiny)).to(x.dtype)
