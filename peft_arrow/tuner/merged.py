"""The experts chosen for a row as one LoRA, so that decoding does not touch the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from ..routers import Routing


@dataclass(frozen=True)
class MergedRows:
    """One LoRA a row of the batch; shorter ones are padded with zeros.

    Args:
        lora_A (`torch.Tensor`): (B, R, I).
        lora_B (`torch.Tensor`): (B, O, R), routing weights and scalings in it.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor

    def delta(self, x_BSI: torch.Tensor) -> torch.Tensor:
        """The update of each row's tokens, (B, S, O)."""
        return (x_BSI @ self.lora_A.mT) @ self.lora_B.mT


@torch.no_grad()
def merge_rows(
    decided: Routing,
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]],
    scalings: Sequence[float],
    aggregation: str,
    device: torch.device,
) -> MergedRows:
    """The chosen experts of each row side by side (`"output"`), or the weighted sums of their factors (`"parameter"`).

    Args:
        decided (`Routing`): (B, K).
        factors (list of (A (r, I), B (O, r))): of the experts of the layer.
        scalings (`Sequence[float]`): of the experts.
        aggregation (`str`): `"output"` or `"parameter"`, see `peft_arrow.ops.eager`.
        device (`torch.device`): where the result is needed; paged experts rest elsewhere.
    """
    rows = []
    for index_K, weights_K in zip(decided.top_k_index.tolist(), decided.top_k_weights.tolist(), strict=True):
        chosen = [(e, weight) for e, weight in zip(index_K, weights_K, strict=True) if 0 <= e < len(factors)]
        lora_A = [factors[e][0].to(device) for e, _ in chosen]
        lora_B = [factors[e][1].to(device) * (weight * scalings[e]) for e, weight in chosen]
        if not chosen:
            lora_A, lora_B = [factors[0][0][:0].to(device)], [factors[0][1][:, :0].to(device)]
        elif aggregation == "parameter":
            lora_A = [sum(half * weight for half, (_, weight) in zip(lora_A, chosen, strict=True))]
            lora_B = [sum(lora_B)]
        rows.append((torch.cat(lora_A), torch.cat(lora_B, dim=1)))
    rank = max(half.shape[0] for half, _ in rows)
    return MergedRows(
        torch.stack([pad(half, (0, 0, 0, rank - half.shape[0])) for half, _ in rows]),
        torch.stack([pad(half, (0, rank - half.shape[1])) for _, half in rows]),
    )
