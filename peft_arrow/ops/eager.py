"""The definition of routed LoRA in plain torch; every other kernel is compared with it."""

from __future__ import annotations

import torch

from .stack import ExpertBank, ExpertStack, shrink


def eager(x_TI: torch.Tensor, stack: ExpertStack, weights_TE: torch.Tensor, aggregation: str) -> torch.Tensor:
    """Apply the routed experts one after the other.

    `aggregation="output"`: y = sum_i w_i s_i B_i (A_i x). `aggregation="parameter"` (arXiv 2405.11157, section 4.1,
    with each expert's scaling on its output factor): y = (sum_j w_j s_j B_j) (sum_i w_i A_i) x.

    Args:
        x_TI (`torch.Tensor`): layer inputs (T, I) in the dtype of the factors.
        stack (`ExpertStack`): the experts.
        weights_TE (`torch.Tensor`): float32 (T, E), 0 where an expert is not chosen.
        aggregation (`str`): `"output"` or `"parameter"`.

    Returns:
        `torch.Tensor`: (T, O).
    """
    shrunk = [expert for bank in stack.banks for expert in _shrunk_experts(x_TI, bank, stack.training)]
    if aggregation == "parameter":
        mixed = sum(z_Tr * weights_TE[:, e, None].to(z_Tr.dtype) for e, z_Tr, _, _ in shrunk)
        shrunk = [(e, mixed, lora_B_Or, scaling) for e, _, lora_B_Or, scaling in shrunk]
    y_TO = None
    for e, z_Tr, lora_B_Or, scaling in shrunk:
        weighted_Tr = z_Tr * (weights_TE[:, e, None] * scaling).to(z_Tr.dtype)
        delta_TO = torch.nn.functional.linear(weighted_Tr, lora_B_Or)
        y_TO = delta_TO if y_TO is None else y_TO + delta_TO
    return y_TO


def _shrunk_experts(x_TI: torch.Tensor, bank: ExpertBank, training: bool):
    """Yield (position in the layer, A_i x, B_i, scaling) for the experts of a bank."""
    pieces_Tr = shrink(x_TI, bank, training).split(bank.ranks, dim=-1)
    lora_B = bank.lora_B.weight.split(bank.ranks, dim=1)
    yield from zip(bank.experts, pieces_Tr, lora_B, bank.scalings, strict=True)
