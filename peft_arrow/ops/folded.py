"""Routing weights folded into rank space: two matmuls a bank, whatever the number of experts and their ranks.

The only kernel that calls the linear modules and nothing else of the weights, and so the one that is safe where hooks
materialise a module's parameters (FSDP, ZeRO, accelerate's offloading).
"""

from __future__ import annotations

import torch

from .stack import ExpertBank, ExpertStack, dense_weights, shrink


def folded(
    x_TI: torch.Tensor,
    stack: ExpertStack,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    aggregation: str,
    onto_TO: torch.Tensor | None = None,
) -> torch.Tensor:
    """Same result as `eager`; peak extra memory is (T, R), never (T, E, O). Arguments as for `eager`."""
    weights_TE = dense_weights(index_TK, weights_TK, stack.num_experts)
    shrunk_TR = [shrink(x_TI, bank, stack.training) for bank in stack.banks]
    if aggregation == "parameter":
        mixed_Tr = sum(
            (z_TR * weights_TE.index_select(1, bank.constants.owner_R).to(z_TR.dtype))
            .unflatten(1, (len(bank.ranks), bank.ranks[0]))
            .sum(1)
            for bank, z_TR in zip(stack.banks, shrunk_TR, strict=True)
        )
        shrunk_TR = [mixed_Tr.repeat(1, len(bank.ranks)) for bank in stack.banks]
    y_TO = None
    for bank, z_TR in zip(stack.banks, shrunk_TR, strict=True):
        tables = bank.constants
        gate_TR = weights_TE.index_select(1, tables.owner_R) * tables.scaling_R
        delta_TO = bank.lora_B(z_TR * gate_TR.to(z_TR.dtype))
        y_TO = delta_TO if y_TO is None else y_TO + delta_TO
    return y_TO if onto_TO is None else onto_TO.add_(y_TO)


def folded_gated(x_TI: torch.Tensor, bank: ExpertBank, gates_TE: torch.Tensor, onto_TO: torch.Tensor) -> torch.Tensor:
    """`folded` for a bank of all experts, of one rank, whose weights are at hand; added to `onto_TO` in place.

    Args:
        x_TI (`torch.Tensor`): layer inputs (T, I).
        bank (`ExpertBank`): the experts.
        gates_TE (`torch.Tensor`): float32 (T, E), weights times scalings.
        onto_TO (`torch.Tensor`): (T, O).
    """
    z_TER = torch.mm(x_TI, bank.lora_A.weight.t()).view(*gates_TE.shape, -1)
    gated_TER = z_TER.mul_(gates_TE.unsqueeze(-1).to(z_TER.dtype))
    return onto_TO.addmm_(gated_TER.view(x_TI.shape[0], -1), bank.lora_B.weight.t())
