"""The chosen experts' rows read where they lie: for many tokens on a CPU without gradients. Cost of `top_k` experts.

Nothing is sorted or copied. Shrinking is a matrix product of which only the chosen places are computed
(`torch.sparse.sampled_addmm`), expanding a weighted sum of the chosen rows (`embedding_bag`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .grouped import grouped
from .sparse_calls import bagged, borrowed, sampled
from .stack import ExpertBank, ExpertStack, local_index


SPARSE_DTYPES = (torch.float32, torch.float64)


def sparse(
    x_TI: torch.Tensor,
    stack: ExpertStack,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    aggregation: str,
    onto_TO: torch.Tensor | None = None,
) -> torch.Tensor:
    """Same result as `eager`; peak extra memory is (T, O). Arguments as for `eager`, and `onto_TO` to add to in place.

    On other devices, in other dtypes, with gradients and in training `grouped` runs in its place.
    """
    if not is_sparse(x_TI, stack):
        return grouped(x_TI, stack, index_TK, weights_TK, aggregation, onto_TO)
    columns, gates, shrunk, mixed_T1R = [], [], [], None
    for bank in stack.banks:
        local_TK = local_index(bank, index_TK).remainder(len(bank.experts) + 1)
        columns_TKR, scaling_TKR = bank.constants.columns_MR[local_TK], bank.constants.scaling_MR[local_TK]
        z_TKR = sampled(x_TI, bank.lora_A.weight, columns_TKR.flatten(1)).view(scaling_TKR.shape)
        if aggregation == "parameter":
            weights_TK1 = (weights_TK * (local_TK < len(bank.experts))).unsqueeze(-1).to(x_TI.dtype)
            mixed_T1R = (z_TKR * weights_TK1).sum(1, keepdim=True) + (0.0 if mixed_T1R is None else mixed_T1R)
        columns.append(columns_TKR)
        gates.append((weights_TK.unsqueeze(-1) * scaling_TKR).to(x_TI.dtype))
        shrunk.append(z_TKR)
    y_TO = x_TI.new_zeros(x_TI.shape[0], stack.out_features) if onto_TO is None else onto_TO
    for bank, columns_TKR, gate_TKR, z_TKR in zip(stack.banks, columns, gates, shrunk, strict=True):
        gated_TKR = gate_TKR * (z_TKR if mixed_T1R is None else mixed_T1R)
        y_TO.add_(bagged(gated_TKR.flatten(1), bank.lora_B.weight, columns_TKR.flatten(1)))
    return y_TO


def sparse_gated(
    x_TI: torch.Tensor, bank: ExpertBank, columns_TN: torch.Tensor, gates_TK: torch.Tensor, onto_TO: torch.Tensor
) -> torch.Tensor:
    """`sparse` for a bank of all experts, of one rank, where all indices are experts; added to `onto_TO` in place.

    Args:
        x_TI (`torch.Tensor`): layer inputs (T, I).
        bank (`ExpertBank`): the experts, whose B lies by expert.
        columns_TN (`torch.Tensor`): int64 (T, K x rank), the columns of the chosen experts.
        gates_TK (`torch.Tensor`): float32 (T, K), weights times scalings.
        onto_TO (`torch.Tensor`): (T, O).
    """
    z_TN = sampled(x_TI, bank.lora_A.weight, columns_TN)
    z_TN.view(*gates_TK.shape, -1).mul_(gates_TK.unsqueeze(-1))
    return onto_TO.add_(bagged(z_TN, bank.lora_B.weight, columns_TN))


def shrink_token(
    x_1I: torch.Tensor, banks: Sequence[ExpertBank], index_GK: torch.Tensor, gates_GK: torch.Tensor
) -> torch.Tensor:
    """What the chosen experts of several modules make of one token, weighted: (G, K x rank).

    For one token a copy of their rows, into memory that is there, costs less than a sparse matrix a module.

    Args:
        x_1I (`torch.Tensor`): the modules' input (1, I).
        banks (`Sequence[ExpertBank]`): of each of G modules, of all experts, with one rank.
        index_GK (`torch.Tensor`): int64 (G, K), the experts.
        gates_GK (`torch.Tensor`): float32 (G, K), weights times scalings.
    """
    width, num_chosen = x_1I.shape[1], index_GK.shape[1]
    by_expert = [bank.lora_A.weight.view(len(bank.ranks), -1) for bank in banks]
    chosen = borrowed(index_GK.numel(), by_expert[0])
    for rows, index_K, piece in zip(by_expert, index_GK.unbind(), chosen.split(num_chosen), strict=True):
        torch.index_select(rows, 0, index_K, out=piece)
    z = torch.mv(chosen.view(-1, width), x_1I.view(-1))
    z.view(gates_GK.numel(), -1).mul_(gates_GK.view(-1, 1))
    return z.view(len(banks), -1)


def is_sparse(x_TI: torch.Tensor, stack: ExpertStack) -> bool:
    """Whether this kernel can run."""
    return (
        is_for_sparse(x_TI.device, x_TI.dtype)
        and not stack.training
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def is_for_sparse(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this kernel is for factors and inputs of the dtype on the device."""
    return device.type == "cpu" and dtype in SPARSE_DTYPES
