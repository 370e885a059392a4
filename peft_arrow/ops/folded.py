"""Routing weights folded into rank space: two matmuls a bank, whatever the number of experts and their ranks.

The only kernel that calls the linear modules and nothing else of the weights, and so the one that is safe where hooks
materialise a module's parameters (FSDP, ZeRO, accelerate's offloading).
"""

from __future__ import annotations

import torch

from .stack import ExpertBank, ExpertStack, shrink


def folded(x_TI: torch.Tensor, stack: ExpertStack, weights_TE: torch.Tensor, aggregation: str) -> torch.Tensor:
    """Same result as `eager`; peak extra memory is (T, R), never (T, E, O). Arguments as for `eager`."""
    shrunk_TR = [shrink(x_TI, bank, stack.training) for bank in stack.banks]
    gates_TR = [weights_TE.index_select(1, bank.owner_R) for bank in stack.banks]
    if aggregation == "parameter":
        mixed_Tr = sum(
            (z_TR * gate_TR.to(z_TR.dtype)).unflatten(1, (len(bank.ranks), bank.ranks[0])).sum(1)
            for bank, z_TR, gate_TR in zip(stack.banks, shrunk_TR, gates_TR, strict=True)
        )
        shrunk_TR = [mixed_Tr.repeat(1, len(bank.ranks)) for bank in stack.banks]
    y_TO = None
    for bank, z_TR, gate_TR in zip(stack.banks, shrunk_TR, gates_TR, strict=True):
        delta_TO = _expand(z_TR, bank, gate_TR)
        y_TO = delta_TO if y_TO is None else y_TO + delta_TO
    return y_TO


def _expand(z_TR: torch.Tensor, bank: ExpertBank, gate_TR: torch.Tensor) -> torch.Tensor:
    return bank.lora_B(z_TR * (gate_TR * bank.scaling_R).to(z_TR.dtype))
