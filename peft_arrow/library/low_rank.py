"""The best low-rank factors of a sum of low-rank updates, without forming the sum."""

from __future__ import annotations

import torch


def truncated(
    lora_A: torch.Tensor, lora_B: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Best factors of that rank of B @ A, by an SVD of the core between two QRs (Eckart-Young).

    Args:
        lora_A (`torch.Tensor`): (R, I).
        lora_B (`torch.Tensor`): (O, R).
        rank (`int`): rank to keep, capped by the sizes.

    Returns:
        A (rank, I), B (O, rank), the kept and the lost sum of squared singular values.
    """
    Q_A, R_A = torch.linalg.qr(lora_A.T)
    Q_B, R_B = torch.linalg.qr(lora_B)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    rank = min(rank, S.shape[0])
    root = S[:rank].sqrt()
    squares = S.double().square()
    A, B = root[:, None] * (Vh[:rank] @ Q_A.T), (Q_B @ U[:, :rank]) * root
    return A, B, float(squares[:rank].sum()), float(squares[rank:].sum())
