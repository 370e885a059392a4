"""The linear map of a prompt-level router: from the features of a prompt to scores."""

from __future__ import annotations

import torch
from torch import nn


class PromptHead(nn.Module):
    """Scores (B, N) of features (B, F), float32, frozen: weight (x - center) + bias, or cosines with the rows.

    It begins as NaN: nothing is loaded yet.

    Args:
        scores, features (`int`): N and F.
        is_cosine (`bool`): whether x - center and the rows are taken at length 1.
    """

    def __init__(self, scores: int, features: int, is_cosine: bool) -> None:
        super().__init__()
        self.is_cosine = is_cosine
        for name, shape in (("weight", (scores, features)), ("bias", (scores,)), ("center", (features,))):
            self.register_parameter(name, nn.Parameter(torch.full(shape, float("nan")), requires_grad=False))

    @torch.no_grad()
    def fill(self, weight: torch.Tensor, bias: torch.Tensor, center: torch.Tensor) -> PromptHead:
        """Take these values; returns self."""
        for mine, given in ((self.weight, weight), (self.bias, bias), (self.center, center)):
            mine.copy_(given)
        return self

    def forward(self, features_BF: torch.Tensor) -> torch.Tensor:
        """Scores, float32 (B, N).

        Raises:
            RuntimeError: it was neither filled nor loaded.
        """
        if not torch.compiler.is_compiling() and torch.isnan(self.center).any():
            raise RuntimeError(
                "what this prompt-level router learnt was not loaded; load the model with PeftModel.from_pretrained "
                "(transformers' own load_adapter knows the layers alone)."
            )
        x_BF = features_BF.float() - self.center.float()
        if self.is_cosine:
            x_BF = nn.functional.normalize(x_BF, dim=-1)
        return nn.functional.linear(x_BF, self.weight.float(), self.bias.float())
