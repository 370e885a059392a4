"""Arrow: score an expert by the input's length along the direction that its update amplifies most."""

from __future__ import annotations

import torch

from .base import Router


class ArrowRouter(Router):
    """|x . v_i|, where v_i is the top right singular vector of expert i's update (arXiv 2405.11157, section 4.1).

    Neither x nor the score is normalised (as in the paper's code), so weights grow sharper with the norm of x. The
    absolute value makes the arbitrary sign of a singular vector irrelevant.
    """

    name = "arrow"
    paper = "https://arxiv.org/abs/2405.11157"
    uses_prototypes = True

    def score(self, x_TI, project, num_experts) -> torch.Tensor:
        """Router logits, float32 (T, E)."""
        return project(x_TI).abs()
