"""An error at the first backward through a model that was loaded for inference, where nothing would train."""

from __future__ import annotations

from collections.abc import Callable

import torch


class _Tripwire(torch.autograd.Function):
    @staticmethod
    def forward(ctx, result, anchor, nothing_trains):
        ctx.nothing_trains = nothing_trains
        return result.view_as(result)

    @staticmethod
    def backward(ctx, grad):
        if ctx.nothing_trains():
            raise RuntimeError(
                "This ArrowLoraModel was loaded for inference and has no trainable parameter, so training would "
                "change nothing. Load it with is_trainable=True, as in ArrowLoraModel.from_pretrained(base, adapters, "
                "is_trainable=True) or PeftModel.from_pretrained(base, folder, is_trainable=True); for gradients of "
                "the inputs call model.eval() first."
            )
        return grad, None, None


def trip_on_backward(result: torch.Tensor, nothing_trains: Callable[[], bool]) -> torch.Tensor:
    """`result`, unchanged, whose backward raises a `RuntimeError` that names `is_trainable=True` if nothing trains."""
    anchor = torch.zeros((), requires_grad=True, device=result.device)
    return _Tripwire.apply(result, anchor, nothing_trains)
