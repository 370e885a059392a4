"""The chosen experts' rows read where they lie: for many tokens on a CPU without gradients. Cost of `top_k` experts.

Nothing is sorted or copied. Shrinking is a matrix product of which only the chosen places are computed
(`torch.sparse.sampled_addmm`), expanding a weighted sum of the chosen rows (`embedding_bag`).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from functools import cache, lru_cache

import torch

from .grouped import grouped
from .stack import ExpertBank, ExpertStack, local_index


SPARSE_DTYPES = (torch.float32, torch.float64)
SUM = 0  # what `embedding_bag` calls this mode
_memory = threading.local()


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
    pieces = _borrowed(index_GK.numel(), by_expert[0]).split(num_chosen)
    for rows, index_K, piece in zip(by_expert, index_GK.unbind(), pieces, strict=True):
        torch.index_select(rows, 0, index_K, out=piece)
    z = torch.mv(_borrowed(index_GK.numel(), by_expert[0]).view(-1, width), x_1I.view(-1))
    z.view(gates_GK.numel(), -1).mul_(gates_GK.view(-1, 1))
    return z.view(len(banks), -1)


def is_sparse(x_TI: torch.Tensor, stack: ExpertStack) -> bool:
    """Whether this kernel can run."""
    return (
        x_TI.device.type == "cpu"
        and x_TI.dtype in SPARSE_DTYPES
        and not stack.training
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def sampled(x_TI: torch.Tensor, factors_RI: torch.Tensor, columns_TN: torch.Tensor) -> torch.Tensor:
    """x_TI @ factors_RI^T at the given columns of each row, (T, N); a column may come twice."""
    tokens, width = columns_TN.shape
    if width >= factors_RI.shape[0]:
        return torch.mm(x_TI, factors_RI.t()).gather(1, columns_TN)
    places = torch.sparse_csr_tensor(
        _starts(tokens, width)[0],
        columns_TN.view(-1),
        x_TI.new_zeros(tokens * width),
        (tokens, factors_RI.shape[0]),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(places, x_TI.contiguous(), factors_RI.t(), beta=0.0).values().view(tokens, width)


def bagged(z_TN: torch.Tensor, factors_OR: torch.Tensor, columns_TN: torch.Tensor) -> torch.Tensor:
    """For each row the sum of the given columns of `factors_OR`, weighted, (T, O)."""
    rows_RO = factors_OR.t().contiguous()  # no copy where the factors lie by expert
    starts = _starts(*columns_TN.shape)[1]
    return torch.embedding_bag(rows_RO, columns_TN.view(-1), starts, False, SUM, False, z_TN.view(-1))[0]


def _borrowed(rows: int, like: torch.Tensor) -> torch.Tensor:
    """Memory of this thread for `rows` rows as in `like`, until the next call; fresh memory has to be mapped first."""
    size = rows * like.shape[1]
    known = getattr(_memory, "kept", None)
    if known is None or known.numel() < size or known.dtype != like.dtype:
        with torch.inference_mode(False):
            known = _memory.kept = torch.empty(size, dtype=like.dtype)
    return known[:size].view(rows, -1)


@lru_cache(maxsize=64)
def _starts(tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each row of a matrix with `width` places a row starts, with the end and without."""
    quieten()
    with torch.inference_mode(False):
        starts = torch.arange(tokens + 1) * width
        return starts, starts[:-1]


@cache
def quieten() -> None:
    """Make the first sparse tensor of the process, at which torch warns that sparse tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)
