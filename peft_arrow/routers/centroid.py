"""Centroid matching: score an expert by how alike the input is to the mean input of its own data."""

from __future__ import annotations

import torch

from .base import LayerInput, Option, Router


class CentroidRouter(Router):
    """cos(x, c_i), where c_i is the mean input of this module over expert i's data (CM of arXiv 2405.11157, 4.2).

    The data is run with expert i active, as in the paper's code. `score="dot"` is that code's form: the dot product
    with c_i / |c_i|, divided by the root of the input size. Both keep all experts there: `top_k` as large as E.
    """

    name = "centroid"
    paper = "https://arxiv.org/abs/2405.11157"
    summary = "cos(x, c_i), c_i the mean input over the expert's data"
    options = {"score": Option("cosine", ("cosine", "dot"), "the paper's cosine, or its code's dot product")}
    needs_data = True
    stores_rows = True

    def score(self, layer: LayerInput) -> torch.Tensor:
        """Router logits, float32 (T, E); the stored rows have length 1."""
        x_TI = layer.x_TI.float()
        if self.chosen["score"] == "dot":
            return layer.fitted(x_TI) / x_TI.shape[-1] ** 0.5
        return layer.fitted(torch.nn.functional.normalize(x_TI, dim=-1))
