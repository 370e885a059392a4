"""The definition of routed LoRA in plain torch; every other kernel is compared with it."""

from __future__ import annotations

import torch

from .stack import ExpertBank, ExpertStack, shrink


def eager(
    x_TI: torch.Tensor,
    stack: ExpertStack,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    aggregation: str,
    onto_TO: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply the routed experts one after the other.

    `aggregation="output"`: y = sum_i w_i s_i B_i (A_i x). `aggregation="parameter"` (arXiv 2405.11157, section 4.1,
    with each expert's scaling on its output factor): y = (sum_j w_j s_j B_j) (sum_i w_i A_i) x.

    Args:
        x_TI (`torch.Tensor`): layer inputs (T, I) in the dtype of the factors.
        stack (`ExpertStack`): the experts.
        index_TK (`torch.Tensor`): int64 (T, K), chosen experts by position in the layer; -1 and E stand for none.
        weights_TK (`torch.Tensor`): float32 (T, K).
        aggregation (`str`): `"output"` or `"parameter"`.
        onto_TO (`torch.Tensor`, *optional*):
            (T, O), what the result is added to in place and returned; only where no gradient is needed.

    Returns:
        `torch.Tensor`: (T, O).
    """
    shrunk = [expert for bank in stack.banks for expert in _shrunk_experts(x_TI, bank, stack.training)]
    weights = {e: (weights_TK * (index_TK == e)).sum(-1, keepdim=True) for e, _, _, _ in shrunk}
    if aggregation == "parameter":
        mixed = sum(z_Tr * weights[e].to(z_Tr.dtype) for e, z_Tr, _, _ in shrunk)
        shrunk = [(e, mixed, lora_B_Or, scaling) for e, _, lora_B_Or, scaling in shrunk]
    y_TO = None
    for e, z_Tr, lora_B_Or, scaling in shrunk:
        weighted_Tr = z_Tr * (weights[e] * scaling).to(z_Tr.dtype)
        delta_TO = torch.nn.functional.linear(weighted_Tr, lora_B_Or)
        y_TO = delta_TO if y_TO is None else y_TO + delta_TO
    return y_TO if onto_TO is None else onto_TO.add_(y_TO)


def _shrunk_experts(x_TI: torch.Tensor, bank: ExpertBank, training: bool):
    """Yield (position in the layer, A_i x, B_i, scaling) for the experts of a bank."""
    pieces_Tr = shrink(x_TI, bank, training).split(bank.ranks, dim=-1)
    lora_B = bank.lora_B.weight.split(bank.ranks, dim=1)
    yield from zip(bank.experts, pieces_Tr, lora_B, bank.scalings, strict=True)
