"""SpectR and norm: score an expert by the length of the input in its subspace, or of its whole output."""

from __future__ import annotations

import torch

from .base import LayerInput, Option, Router


WEIGHTS = Option("softmax", ("softmax", "equal"), "of the kept experts; 'equal' is 1/k, as in the code of SpectR")


class SpectrRouter(Router):
    """|V_i^T x|, where V_i holds all right singular vectors of expert i's update (arXiv 2504.03454).

    It needs no singular values. SpectR's code keeps 4 experts and weighs them equally and in parameter space:
    `top_k=4, weights="equal", aggregation="parameter"`.
    """

    name = "spectr"
    paper = "https://arxiv.org/abs/2504.03454"
    summary = "|V_i^T x|, the length of x in the row space of the expert's update"
    options = {"weights": WEIGHTS}

    def score(self, layer: LayerInput) -> torch.Tensor:
        """Router logits, float32 (T, E)."""
        return layer.norms("projection")


class NormRouter(Router):
    """|s_i B_i A_i x|, the length of what expert i would add (arXiv 2509.18093 maximises it).

    It depends on the size of the update: of two experts that point the same way, the longer wins.
    """

    name = "norm"
    paper = "https://arxiv.org/abs/2509.18093"
    summary = "|s_i B_i A_i x|, the length of what the expert would add"
    options = {"weights": WEIGHTS}

    def score(self, layer: LayerInput) -> torch.Tensor:
        """Router logits, float32 (T, E)."""
        return layer.norms("activation")
