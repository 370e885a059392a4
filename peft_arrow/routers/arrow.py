"""Arrow: score an expert by the input's length along the direction that its update amplifies most."""

from __future__ import annotations

import torch

from .base import LayerInput, Router


class ArrowRouter(Router):
    """|x . v_i|, where v_i is the top right singular vector of expert i's update (arXiv 2405.11157, section 4.1).

    Neither x nor the score is normalised (as in the paper's code), so weights grow sharper with the norm of x. The
    absolute value makes the arbitrary sign of a singular vector irrelevant.
    """

    name = "arrow"
    paper = "https://arxiv.org/abs/2405.11157"
    summary = "|x . v_i|, v_i the top right singular vector of the expert's update"
    uses_prototypes = True

    def score(self, layer: LayerInput) -> torch.Tensor:
        """Router logits, float32 (T, E)."""
        return layer.project().abs()
