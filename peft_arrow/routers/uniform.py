"""Uniform: every expert with the same weight, whatever the token."""

from __future__ import annotations

import torch

from .base import Router, Routing


class UniformRouter(Router):
    """1 / E for each of the E experts of the layer; `top_k` and the temperature are ignored."""

    name = "uniform"
    paper = "https://arxiv.org/abs/2405.11157"
    uses_all = True

    def score(self, x_TI, project, num_experts) -> torch.Tensor:
        """Router logits, float32 (T, E): all 0."""
        return torch.zeros(x_TI.shape[0], num_experts, dtype=torch.float32, device=x_TI.device)

    def route(self, x_TI, project, num_experts) -> Routing:
        """All experts, in order, at the same weight."""
        index_TK = torch.arange(num_experts, device=x_TI.device).expand(x_TI.shape[0], num_experts)
        weights_TK = torch.full(
            (x_TI.shape[0], num_experts), 1.0 / num_experts, dtype=torch.float32, device=x_TI.device
        )
        return Routing(index_TK, weights_TK)
