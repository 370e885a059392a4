"""Exact prototypes: the top right singular vector of each expert's update, without random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch


CHUNK = 64
# Pivots of the scaled A A^T below which its rows are so close to dependent that float64 loses half its digits.
LEAST_PIVOT = 1e-4


@torch.no_grad()
def top_right_singular_vectors(lora_A: Sequence[torch.Tensor], lora_B: Sequence[torch.Tensor]) -> torch.Tensor:
    """v_i = argmax over unit v of |B_i A_i v| (arXiv 2405.11157, section 4.1).

    With A^T = Q R, the right singular vectors of B A are Q times the eigenvectors of the r x r matrix R (B^T B) R^T,
    so no matrix of the size of the base weight is made. R comes from the Cholesky factor of A A^T, its rows scaled to
    length 1, and from a QR decomposition for the experts where that would lose digits. The work is done in float64
    where the device has it. An expert with B = 0 gets the top right singular vector of A. The sign is fixed: the entry
    of largest magnitude is positive.

    Args:
        lora_A (`Sequence[torch.Tensor]`): E tensors (r_i, I); ranks may differ.
        lora_B (`Sequence[torch.Tensor]`): E tensors (O, r_i).

    Returns:
        `torch.Tensor`: float32 (E, I), each row of unit length (0 where A is 0).
    """
    prototypes_EI = torch.empty(len(lora_A), lora_A[0].shape[1], dtype=torch.float32, device=lora_A[0].device)
    by_rank: dict[int, list[int]] = {}
    for e, factor in enumerate(lora_A):
        by_rank.setdefault(factor.shape[0], []).append(e)
    for experts in by_rank.values():
        for start in range(0, len(experts), CHUNK):
            chunk = experts[start : start + CHUNK]
            stacked_A = torch.stack([lora_A[e] for e in chunk])
            stacked_B = torch.stack([lora_B[e] for e in chunk])
            prototypes_EI[chunk] = _equal_rank(stacked_A, stacked_B).to(prototypes_EI)
    return prototypes_EI


def _equal_rank(lora_A_ErI: torch.Tensor, lora_B_EOr: torch.Tensor) -> torch.Tensor:
    if lora_A_ErI.device.type == "mps":
        lora_A_ErI, lora_B_EOr = lora_A_ErI.cpu(), lora_B_EOr.cpu()
    A_ErI, B_EOr = lora_A_ErI.double(), lora_B_EOr.double()
    v_EI, is_sure_E = _by_cholesky(A_ErI, B_EOr)
    if not is_sure_E.all():
        rest_E = ~is_sure_E
        v_EI[rest_E] = _by_qr(_unit_scale(A_ErI[rest_E]), _unit_scale(B_EOr[rest_E]))
    v_EI = v_EI / v_EI.norm(dim=-1, keepdim=True)
    signs_E1 = v_EI.gather(1, v_EI.abs().argmax(dim=1, keepdim=True)).sign()
    return torch.nan_to_num(v_EI * signs_E1)  # 0 / 0 where A is 0


def _by_cholesky(A_ErI: torch.Tensor, B_EOr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The vectors (E, I), of any length, and bool (E,), whether they have their digits."""
    outer_Err, inner_Err = A_ErI @ A_ErI.mT, B_EOr.mT @ B_EOr
    lengths_Er = outer_Err.diagonal(dim1=1, dim2=2).sqrt()
    is_sure_E = _is_ordinary(outer_Err) & _is_ordinary(inner_Err) & (lengths_Er > 0).all(1)
    lengths_Er = torch.where(is_sure_E[:, None], lengths_Er, 1.0)
    scale_Err = lengths_Er[:, :, None] * lengths_Er[:, None, :]
    identity_rr = torch.eye(scale_Err.shape[-1], dtype=scale_Err.dtype, device=scale_Err.device)
    outer_Err = torch.where(is_sure_E[:, None, None], outer_Err / scale_Err, identity_rr)
    inner_Err = torch.where(is_sure_E[:, None, None], inner_Err * scale_Err, identity_rr)
    L_Err, failed_E = torch.linalg.cholesky_ex(outer_Err)
    is_sure_E = is_sure_E & (failed_E == 0) & (L_Err.diagonal(dim1=1, dim2=2) > LEAST_PIVOT).all(1)
    L_Err = torch.where(is_sure_E[:, None, None], L_Err, identity_rr)
    core_Err = L_Err.mT @ inner_Err @ L_Err
    core_Err = core_Err / core_Err.abs().amax(dim=(1, 2), keepdim=True)
    _, vectors_Err = torch.linalg.eigh(core_Err)
    mix_Er1 = torch.linalg.solve_triangular(L_Err.mT, vectors_Err[:, :, -1:], upper=True)
    return (A_ErI.mT @ (mix_Er1 / lengths_Er[:, :, None])).squeeze(-1), is_sure_E


def _is_ordinary(gram_Err: torch.Tensor) -> torch.Tensor:
    """Whether nothing of it, nor of products with its like, under- or overflows in float64; bool (E,)."""
    trace_E = gram_Err.diagonal(dim1=1, dim2=2).sum(1)
    return (trace_E > 1e-100) & (trace_E < 1e100)


def _by_qr(A_ErI: torch.Tensor, B_EOr: torch.Tensor) -> torch.Tensor:
    """The vectors (E, I) for factors whose largest entry is 1, or which are 0."""
    Q_EIr, R_Err = torch.linalg.qr(A_ErI.mT)
    gram_Err = B_EOr.mT @ B_EOr
    untrained_E = B_EOr.abs().amax(dim=(1, 2)) == 0
    identity_rr = torch.eye(gram_Err.shape[-1], dtype=gram_Err.dtype, device=gram_Err.device)
    gram_Err = torch.where(untrained_E[:, None, None], identity_rr, gram_Err)
    _, vectors_Err = torch.linalg.eigh(R_Err @ gram_Err @ R_Err.mT)
    empty_E = A_ErI.abs().amax(dim=(1, 2)) == 0
    return (Q_EIr @ vectors_Err[:, :, -1:]).squeeze(-1).masked_fill(empty_E[:, None], 0.0)


def _unit_scale(factor: torch.Tensor) -> torch.Tensor:
    largest = factor.abs().amax(dim=(1, 2), keepdim=True)
    return factor / torch.where(largest > 0, largest, torch.ones_like(largest))
