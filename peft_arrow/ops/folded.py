"""Routing weights folded into rank space: two matmuls a bank, whatever the number of experts and their ranks.

The only kernel that calls the linear modules and nothing else of the weights, and so the one that is safe where hooks
materialise a module's parameters (FSDP, ZeRO, accelerate's offloading).
"""

from __future__ import annotations

import torch

from .stack import ExpertStack, dense_weights, shrink


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
    gates_TR = [weights_TE.index_select(1, bank.constants.owner_R) for bank in stack.banks]
    if aggregation == "parameter":
        mixed_Tr = sum(
            (z_TR * gate_TR.to(z_TR.dtype)).unflatten(1, (len(bank.ranks), bank.ranks[0])).sum(1)
            for bank, z_TR, gate_TR in zip(stack.banks, shrunk_TR, gates_TR, strict=True)
        )
        shrunk_TR = [mixed_Tr.repeat(1, len(bank.ranks)) for bank in stack.banks]
    y_TO = onto_TO
    for bank, z_TR, gate_TR in zip(stack.banks, shrunk_TR, gates_TR, strict=True):
        z_TR = z_TR * (gate_TR * bank.constants.scaling_R).to(z_TR.dtype)
        if onto_TO is not None:
            onto_TO.addmm_(z_TR, bank.lora_B.weight.t())
        elif y_TO is None:
            y_TO = bank.lora_B(z_TR)
        else:
            y_TO = y_TO + bank.lora_B(z_TR)
    return y_TO
