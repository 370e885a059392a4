"""The chosen experts' factors copied for each token: for few tokens, as in decoding. Cost of `top_k` experts."""

from __future__ import annotations

import torch

from .stack import ExpertBank, ExpertStack, dropped, local_index


def gather(
    x_TI: torch.Tensor,
    stack: ExpertStack,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    aggregation: str,
    onto_TO: torch.Tensor | None = None,
) -> torch.Tensor:
    """Same result as `eager`; peak extra memory is (T, K, largest rank, I + O). Arguments as for `eager`."""
    chosen = [_Chosen(bank, index_TK, weights_TK, x_TI.dtype) for bank in stack.banks]
    shrunk_TKR = [one.shrink(x_TI, stack.training) for one in chosen]
    if aggregation == "parameter":
        mixed_T1R = sum(
            (z_TKR * one.weights_TK1).sum(1, keepdim=True) for one, z_TKR in zip(chosen, shrunk_TKR, strict=True)
        )
        shrunk_TKR = [mixed_T1R.expand(one.columns_TKR.shape) for one in chosen]
    y_TO = onto_TO
    for one, z_TKR in zip(chosen, shrunk_TKR, strict=True):
        delta_TO = one.expand(z_TKR)
        if onto_TO is not None:
            onto_TO.add_(delta_TO)
        else:
            y_TO = delta_TO if y_TO is None else y_TO + delta_TO
    return y_TO


class _Chosen:
    """The columns of a bank that belong to the experts of each token."""

    def __init__(self, bank: ExpertBank, index_TK: torch.Tensor, weights_TK: torch.Tensor, dtype: torch.dtype) -> None:
        tables, local_TK = bank.constants, local_index(bank, index_TK)
        self.bank = bank
        self.local_TK = local_TK
        self.columns_TKR = tables.columns_MR[local_TK]
        scaling_TKR = tables.scaling_MR[local_TK]
        # an expert of another bank has no column here: nothing of it is mixed in
        is_here_TK = (local_TK >= 0) & (local_TK < len(bank.experts))
        self.weights_TK1 = (weights_TK * is_here_TK).unsqueeze(-1).to(dtype)
        self.gates_TKR = (weights_TK.unsqueeze(-1) * scaling_TKR).to(dtype)

    def shrink(self, x_TI: torch.Tensor, training: bool) -> torch.Tensor:
        """A_i x of the chosen experts, (T, K, largest rank)."""
        tokens, num_chosen, rank = self.columns_TKR.shape
        rows = self.bank.lora_A.weight.index_select(0, self.columns_TKR.flatten())
        if training and any(self.bank.dropouts):
            rates_M = torch.tensor([*self.bank.dropouts, 0.0], device=x_TI.device, dtype=torch.float32)
            x_TKI = dropped(x_TI.unsqueeze(1).expand(-1, num_chosen, -1), rates_M[self.local_TK])
            return torch.einsum("tkri,tki->tkr", rows.view(tokens, num_chosen, rank, x_TI.shape[1]), x_TKI)
        z_TKR1 = torch.bmm(rows.view(tokens, num_chosen * rank, x_TI.shape[1]), x_TI.unsqueeze(-1))
        return z_TKR1.view(tokens, num_chosen, rank)

    def expand(self, z_TKR: torch.Tensor) -> torch.Tensor:
        """The weighted sum of B_i z_i, (T, O)."""
        tokens = z_TKR.shape[0]
        gated_T1R = (z_TKR * self.gates_TKR).flatten(1).unsqueeze(1)
        columns = self.bank.lora_B.weight.t().index_select(0, self.columns_TKR.flatten())
        return torch.bmm(gated_T1R, columns.view(tokens, gated_T1R.shape[2], columns.shape[1])).squeeze(1)
