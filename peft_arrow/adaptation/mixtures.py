"""Routing tuned over a library: every module's factors are a weighted mean of the experts', and the weights learn."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from .starts import Experts, linear_of


EPSILON = 1e-8  # mttl's, in the sum that the weights are divided by
LOGITS = "logits"


class Mixture(nn.Module):
    """A factor as sum_i w_i of the experts' (Poly, arXiv 2202.13914): w = sigmoid(z) / sum sigmoid(z), at z = 0 equal.

    Args:
        factors (`torch.Tensor`): (E, R, I) or (E, O, R).
        logits (`nn.Parameter`): z (1, E), one for both factors of a module; PEFT saves no vectors without a warning.
        is_trained (`bool`): whether the experts' factors learn too.
    """

    def __init__(self, factors: torch.Tensor, logits: nn.Parameter, is_trained: bool) -> None:
        super().__init__()
        self.factors = nn.Parameter(factors, requires_grad=is_trained)
        self.register_parameter(LOGITS, logits)

    def forward(self, own: torch.Tensor) -> torch.Tensor:
        """The mixed factor; `own`, what the LoRA has by itself, is not used."""
        scores = torch.sigmoid(self.logits)
        weights = scores / (scores.sum() + EPSILON)
        return torch.tensordot(weights[0], self.factors, 1).to(own.dtype)


def mix_experts(model: nn.Module, experts: Experts, *, is_trained: bool) -> None:
    """Make every factor of the model's LoRA a mixture of the experts', all with the same weight at first.

    Raises:
        ValueError: the base has no such module, or one of another shape.
    """
    for module, stacks in experts.items():
        logits = None
        for half, stack in zip("AB", stacks):
            linear = linear_of(model, module, half)
            if linear.weight.shape != stack.shape[1:]:
                raise ValueError(
                    f"{module}: the library's lora_{half} is {tuple(stack.shape[1:])}, and the base takes "
                    f"{tuple(linear.weight.shape)}; the library is of another base model."
                )
            device = linear.weight.device
            if logits is None:
                logits = nn.Parameter(torch.zeros(1, len(stack), device=device))
            linear.weight.requires_grad_(False)
            parametrize.register_parametrization(linear, "weight", Mixture(stack.to(device), logits, is_trained))


def settle(model: nn.Module) -> None:
    """Leave a plain LoRA: each factor becomes the tensor that its mixture is now."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def is_logits(name: str) -> bool:
    """Whether a parameter of the model is a mixture's logits."""
    return name.endswith(f".{LOGITS}")
