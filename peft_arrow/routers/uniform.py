"""Uniform: every expert with the same weight, whatever the token."""

from __future__ import annotations

import torch

from .base import LayerInput, Router


class UniformRouter(Router):
    """1 / E for each of the E experts of the layer that are not masked; `top_k` and the temperature are ignored.

    With `aggregation="output"` it is the mean of the updates, with `"parameter"` the paper's: the update of the mean A
    and the mean B (arXiv 2405.11157, section 4.2).
    """

    name = "uniform"
    paper = "https://arxiv.org/abs/2405.11157"
    summary = "the same for every expert"
    uses_all = True

    def score(self, layer: LayerInput) -> torch.Tensor:
        """Router logits, float32 (T, E): all 0."""
        return torch.zeros(layer.x_TI.shape[0], layer.num_experts, dtype=torch.float32, device=layer.x_TI.device)
