"""How frozen experts lie in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..ops import ExpertStack, folds


def lay_out_by_expert(linears: Sequence[nn.Linear]) -> None:
    """Change how frozen weights (O, R) lie in memory, and nothing else: as (R, O), so that an expert is one piece.

    In the usual order an expert has a few bytes in each of O rows, and reading one of a thousand is slow. Weights that
    train keep theirs, because FSDP takes no others.
    """
    for linear in linears:
        weight = linear.weight
        if weight.is_contiguous() and not weight.requires_grad:
            with torch.inference_mode(weight.is_inference()):
                weight.data = weight.data.t().contiguous().t()


def lay_out_chosen(stack: ExpertStack, num_chosen: int) -> None:
    """`lay_out_by_expert` for a stack of which single experts are read at inference."""
    is_eager = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    if (
        is_eager
        and not stack.lies_by_expert()
        and stack.is_whole()
        and not folds(stack, num_chosen, has_gradients=False)
    ):
        lay_out_by_expert([bank.lora_B for bank in stack.banks])
