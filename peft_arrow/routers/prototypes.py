"""Exact prototypes: the top right singular vector of each expert's update, without random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch


CHUNK = 64


@torch.no_grad()
def top_right_singular_vectors(lora_A: Sequence[torch.Tensor], lora_B: Sequence[torch.Tensor]) -> torch.Tensor:
    """v_i = argmax over unit v of |B_i A_i v| (arXiv 2405.11157, section 4.1).

    With A^T = Q R, the right singular vectors of B A are Q times the eigenvectors of the r x r matrix R (B^T B) R^T,
    so no matrix of the size of the base weight is made. Factors are scaled to largest entry 1 first, so that tiny
    updates lose nothing, and the work is done in float64 where the device has it. An expert with B = 0 gets the top
    right singular vector of A. The sign is fixed: the entry of largest magnitude is positive.

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
    A_ErI, B_EOr = _unit_scale(lora_A_ErI.double()), _unit_scale(lora_B_EOr.double())
    Q_EIr, R_Err = torch.linalg.qr(A_ErI.mT)
    gram_Err = B_EOr.mT @ B_EOr
    untrained_E = B_EOr.abs().amax(dim=(1, 2)) == 0
    identity_rr = torch.eye(gram_Err.shape[-1], dtype=gram_Err.dtype, device=gram_Err.device)
    gram_Err = torch.where(untrained_E[:, None, None], identity_rr, gram_Err)
    _, vectors_Err = torch.linalg.eigh(R_Err @ gram_Err @ R_Err.mT)
    v_EI = (Q_EIr @ vectors_Err[:, :, -1:]).squeeze(-1)
    v_EI = v_EI / v_EI.norm(dim=-1, keepdim=True)
    signs_E1 = v_EI.gather(1, v_EI.abs().argmax(dim=1, keepdim=True)).sign()
    empty_E = A_ErI.abs().amax(dim=(1, 2)) == 0
    return torch.where(empty_E[:, None], torch.zeros_like(v_EI), v_EI * signs_E1)


def _unit_scale(factor: torch.Tensor) -> torch.Tensor:
    largest = factor.abs().amax(dim=(1, 2), keepdim=True)
    return factor / torch.where(largest > 0, largest, torch.ones_like(largest))
