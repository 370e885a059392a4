"""torch's calls that read single rows of a matrix where they lie."""

from __future__ import annotations

import threading
import warnings
from functools import cache, lru_cache

import torch


SUM = 0  # what `embedding_bag` calls this mode
_memory = threading.local()


def products_at(
    x_TI: torch.Tensor, factors_RI: torch.Tensor, starts: torch.Tensor, columns_N: torch.Tensor
) -> torch.Tensor:
    """x_TI @ factors_RI^T at the given places alone, (N,).

    Args:
        x_TI (`torch.Tensor`): contiguous (T, I).
        factors_RI (`torch.Tensor`): (R, I).
        starts (`torch.Tensor`): int64 (T + 1,), where each row's columns start in `columns_N`, and the end.
        columns_N (`torch.Tensor`): int64 (N,); a column may come twice in a row.
    """
    quieten()
    places = torch.sparse_csr_tensor(
        starts,
        columns_N,
        x_TI.new_zeros(len(columns_N)),
        (len(x_TI), factors_RI.shape[0]),
        device=x_TI.device,  # and not the default device
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(places, x_TI, factors_RI.t(), beta=0.0).values()


def sampled(x_TI: torch.Tensor, factors_RI: torch.Tensor, columns_TN: torch.Tensor) -> torch.Tensor:
    """x_TI @ factors_RI^T at the given columns of each row, (T, N); a column may come twice."""
    if columns_TN.shape[1] >= factors_RI.shape[0]:
        return torch.mm(x_TI, factors_RI.t()).gather(1, columns_TN)
    starts, _ = _starts(*columns_TN.shape)
    return products_at(x_TI.contiguous(), factors_RI, starts, columns_TN.view(-1)).view(columns_TN.shape)


def bagged(z_TN: torch.Tensor, factors_OR: torch.Tensor, columns_TN: torch.Tensor) -> torch.Tensor:
    """For each row the sum of the given columns of `factors_OR`, weighted, (T, O)."""
    rows_RO = factors_OR.t().contiguous()  # no copy where the factors lie by expert
    _, starts = _starts(*columns_TN.shape)
    return torch.embedding_bag(rows_RO, columns_TN.view(-1), starts, False, SUM, False, z_TN.view(-1))[0]


def borrowed(rows: int, like: torch.Tensor) -> torch.Tensor:
    """Memory of this thread for `rows` rows as in `like`, until the next call; fresh memory has to be mapped first."""
    size = rows * like.shape[1]
    known = getattr(_memory, "kept", None)
    if known is None or known.numel() < size or known.dtype != like.dtype:
        with torch.inference_mode(False):
            known = _memory.kept = torch.empty(size, dtype=like.dtype, device="cpu")
    return known[:size].view(rows, -1)


@lru_cache(maxsize=64)
def _starts(tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each row of a matrix with `width` places a row starts, with the end and without."""
    with torch.inference_mode(False):
        starts = torch.arange(tokens + 1, device="cpu") * width
        return starts, starts[:-1]


@cache
def quieten() -> None:
    """Make the first sparse tensor of the process, at which torch warns that sparse tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), device="cpu", check_invariants=False)
