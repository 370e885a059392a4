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
            (z_TKR * one.weights_TK1()).sum(1, keepdim=True) for one, z_TKR in zip(chosen, shrunk_TKR, strict=True)
        )
        shrunk_TKR = [mixed_T1R.expand(one.gates_TKR.shape) for one in chosen]
    y_TO = None
    for one, z_TKR in zip(chosen, shrunk_TKR, strict=True):
        delta_TO = one.expand(z_TKR)
        y_TO = delta_TO if y_TO is None else y_TO + delta_TO
    return y_TO if onto_TO is None else onto_TO.add_(y_TO)


def gather_gated(
    x_TI: torch.Tensor, bank: ExpertBank, index_TK: torch.Tensor, gates_TK: torch.Tensor, onto_TO: torch.Tensor
) -> torch.Tensor:
    """`gather` for a bank of all experts, of one rank, where all indices are experts; added to `onto_TO` in place.

    Args:
        x_TI (`torch.Tensor`): layer inputs (T, I).
        bank (`ExpertBank`): the experts.
        index_TK (`torch.Tensor`): int64 (T, K).
        gates_TK (`torch.Tensor`): float32 (T, K), weights times scalings.
        onto_TO (`torch.Tensor`): (T, O).
    """
    (tokens, width), members = x_TI.shape, len(bank.ranks)
    place_S = index_TK.reshape(-1)
    lora_A, lora_B = bank.lora_A.weight, bank.lora_B.weight
    rows = lora_A.view(members, -1).index_select(0, place_S).view(tokens, -1, width)
    z_TKR = torch.bmm(rows, x_TI.unsqueeze(-1)).view(*index_TK.shape, -1)
    gated_TR = z_TKR.mul_(gates_TK.unsqueeze(-1).to(z_TKR.dtype)).view(tokens, -1)
    columns = lora_B.t().unflatten(0, (members, -1)).index_select(0, place_S).view(tokens, -1, lora_B.shape[0])
    if tokens == 1:
        return onto_TO.addmm_(gated_TR, columns[0])
    return onto_TO.add_(torch.bmm(gated_TR.unsqueeze(1), columns).squeeze(1))


class _Chosen:
    """The columns of a bank that belong to the experts of each token; S = T x K."""

    def __init__(self, bank: ExpertBank, index_TK: torch.Tensor, weights_TK: torch.Tensor, dtype: torch.dtype) -> None:
        self.bank, self.weights_TK, self.members = bank, weights_TK, len(bank.experts)
        self.local_S = local_index(bank, index_TK).flatten().remainder(self.members + 1)
        scaling_TKR = bank.constants.scaling_MR.index_select(0, self.local_S).unflatten(0, index_TK.shape)
        self.gates_TKR = (weights_TK.unsqueeze(-1) * scaling_TKR).to(dtype)

    def weights_TK1(self) -> torch.Tensor:
        """The routing weights without scaling, 0 where the expert is of another bank or none."""
        is_here_S = self.local_S < self.members
        return (self.weights_TK * is_here_S.view_as(self.weights_TK)).unsqueeze(-1).to(self.gates_TKR.dtype)

    def shrink(self, x_TI: torch.Tensor, training: bool) -> torch.Tensor:
        """A_i x of the chosen experts, (T, K, largest rank)."""
        tokens, num_chosen, rank = self.gates_TKR.shape
        width = x_TI.shape[1]
        rows = self._chosen(self.bank.lora_A.weight)
        if training and any(self.bank.dropouts):
            rates_M = torch.tensor([*self.bank.dropouts, 0.0], device=x_TI.device)
            rates_TK = rates_M[self.local_S].view(tokens, num_chosen)
            x_TKI = dropped(x_TI.unsqueeze(1).expand(-1, num_chosen, -1), rates_TK)
            return torch.einsum("tkri,tki->tkr", rows.view(tokens, num_chosen, rank, width), x_TKI)
        return torch.bmm(rows.view(tokens, num_chosen * rank, width), x_TI.unsqueeze(-1)).view(self.gates_TKR.shape)

    def expand(self, z_TKR: torch.Tensor) -> torch.Tensor:
        """The weighted sum of B_i z_i, (T, O)."""
        tokens, num_chosen, rank = self.gates_TKR.shape
        gated_T1R = (z_TKR * self.gates_TKR).view(tokens, 1, num_chosen * rank)
        columns = self._chosen(self.bank.lora_B.weight.t())
        return torch.bmm(gated_T1R, columns.view(tokens, num_chosen * rank, columns.shape[-1])).squeeze(1)

    def _chosen(self, factors_RN: torch.Tensor) -> torch.Tensor:
        """The rows of the chosen experts; those of no expert are any, and weigh 0."""
        tables = self.bank.constants
        if tables.is_one_rank:
            place_S = self.local_S.clamp(max=self.members - 1)
            return factors_RN.unflatten(0, (self.members, -1)).index_select(0, place_S)
        return factors_RN.index_select(0, tables.columns_MR.index_select(0, self.local_S).flatten())
