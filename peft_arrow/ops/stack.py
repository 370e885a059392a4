"""What a kernel is given: the experts of one layer, stacked.

Shape letters used in the package: T tokens (batch and sequence flattened), E experts of the layer, K chosen experts
per token, R sum of the ranks of a bank, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


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
        owner_R (`torch.Tensor`): int64 (R,), for each column its expert's position in the layer.
        scaling_R (`torch.Tensor`): float32 (R,), for each column its expert's scaling.
    """

    lora_A: nn.Linear
    lora_B: nn.Linear
    experts: tuple[int, ...]
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    dropouts: tuple[float, ...]
    owner_R: torch.Tensor
    scaling_R: torch.Tensor


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
