"""How long an input is in an expert's subspace, or after it, from r numbers a token and expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch


# Directions whose singular value is below this share of the largest belong to no update: they are rounding.
SMALLEST = 1e-6


@torch.no_grad()
def norm_cores(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]], scalings: Sequence[float], kind: str
) -> list[torch.Tensor]:
    """Of each expert the matrix M (r', r) with |M A x| = |V^T x| (`"projection"`) or |s B A x| (`"activation"`).

    With B = Q R and the singular value decomposition R A = U S V^T: B A x = Q R A x, so |B A x| = |R A x|, and
    V^T x = S^-1 U^T R A x. All in float64; an expert with B = 0 is projected on the rows of A.

    Args:
        factors (list of (A (r, I), B (O, r))): of the experts.
        scalings (`Sequence[float]`): of the experts.
        kind (`str`): which.

    Returns:
        `list[torch.Tensor]`: float32, one an expert.
    """
    cores = []
    for (lora_A, lora_B), scaling in zip(factors, scalings, strict=True):
        device = lora_A.device
        A_rI, B_Or = (
            half.detach().to("cpu" if device.type == "mps" else device).double() for half in (lora_A, lora_B)
        )
        if kind == "projection" and not B_Or.any():
            B_Or = torch.eye(B_Or.shape[1], dtype=B_Or.dtype, device=B_Or.device)
        R_rr = torch.linalg.qr(B_Or).R
        if kind == "activation":
            cores.append((scaling * R_rr).float().to(device))
            continue
        Q_Ir, R_A = torch.linalg.qr(A_rI.mT)
        U, S, _ = torch.linalg.svd(R_rr @ R_A.mT, full_matrices=False)
        kept = S > SMALLEST * S.max() if S.max() > 0 else torch.zeros_like(S, dtype=torch.bool)
        cores.append(((U[:, kept] / S[kept]).mT @ R_rr).float().to(device))
    return cores


def core_lengths(pieces_Tr: Sequence[torch.Tensor], cores: Sequence[torch.Tensor]) -> torch.Tensor:
    """|M_i z_i| of each token and expert, float32 (T, E); experts whose M has one shape are done together.

    Args:
        pieces_Tr (`Sequence[torch.Tensor]`): z_i = A_i x, float32 (T, r_i), one an expert.
        cores (`Sequence[torch.Tensor]`): M_i (r'_i, r_i).
    """
    by_shape: dict[torch.Size, list[int]] = {}
    for e, core in enumerate(cores):
        by_shape.setdefault(core.shape, []).append(e)
    columns: list[torch.Tensor | None] = [None] * len(cores)
    for experts in by_shape.values():
        z_ETr = torch.stack([pieces_Tr[e] for e in experts])
        M_ErR = torch.stack([cores[e] for e in experts])
        lengths_ET = (z_ETr @ M_ErR.mT).norm(dim=-1)
        for e, lengths_T in zip(experts, lengths_ET, strict=True):
            columns[e] = lengths_T
    return torch.stack(columns, dim=-1)
