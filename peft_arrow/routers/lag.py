"""LAG: Arrow chooses candidates, the length of the projection or activation ranks them."""

from __future__ import annotations

import math

import torch

from .base import LayerInput, Option, Router
from .spectr import WEIGHTS


class LagRouter(Router):
    """The SpectR score of the `filter_k` experts that Arrow scores highest; the others get none (arXiv 2507.05346).

    The paper filters 20 and keeps one expert a token: `filter_k=20, top_k=1`. With at most `filter_k` experts it is
    SpectR.
    """

    name = "lag"
    paper = "https://arxiv.org/abs/2507.05346"
    summary = "|V_i^T x| (or the activation's length) among the experts that Arrow scores highest"
    options = {
        "filter_k": Option(20, 1, "experts that Arrow keeps"),
        "score": Option("projection", ("projection", "activation"), "what ranks them"),
        "weights": WEIGHTS,
    }
    uses_prototypes = True

    def score(self, layer: LayerInput) -> torch.Tensor:
        """Router logits, float32 (T, E); -inf for those that Arrow leaves out."""
        logits_TE = layer.norms(self.chosen["score"])
        filter_k = self.chosen["filter_k"]
        if filter_k >= layer.num_experts:
            return logits_TE
        index_TK = layer.project().abs().topk(filter_k, dim=-1).indices
        return torch.full_like(logits_TE, -math.inf).scatter(1, index_TK, logits_TE.gather(1, index_TK))
