"""PHATGOOSE: score an expert by a gate that was trained for it alone."""

from __future__ import annotations

import torch

from .base import LayerInput, Router


class PhatgooseRouter(Router):
    """LN(x) . LN(g_i) / sqrt(I), where the gate g_i was trained as sigmoid(g_i . x) on expert i's output (2402.05859).

    LN is a layer norm without weights. Everything but the gates is frozen in that training, and the experts do not see
    each other. The paper keeps two experts: `top_k=2`.
    """

    name = "phatgoose"
    paper = "https://arxiv.org/abs/2402.05859"
    summary = "LN(x) . LN(g_i) / sqrt(I), g_i a gate trained for the expert alone"
    needs_data = True
    stores_rows = True

    def score(self, layer: LayerInput) -> torch.Tensor:
        """Router logits, float32 (T, E); the stored rows are normalised."""
        x_TI = layer.x_TI.float()
        width = x_TI.shape[-1]
        return layer.fitted(torch.nn.functional.layer_norm(x_TI, (width,))) / width**0.5
