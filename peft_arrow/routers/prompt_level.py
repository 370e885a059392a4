"""Routers that look at the prompt once: a trained task predictor, and retrieval of the nearest examples."""

from __future__ import annotations

import torch

from .base import LayerInput, Option, Router


class PromptRouter(Router):
    """The base of routers whose logits come from the prompt's features (B, F) and hold for all layers of a request.

    Features are the mean of the base model's last hidden states over the prompt, without any expert.
    """

    needs_data = True
    is_prompt_level = True

    def score(self, layer: LayerInput) -> torch.Tensor:
        """There is nothing to score in a layer.

        Raises:
            RuntimeError: always; it is reached where no call of the whole model has seen the prompt.
        """
        raise RuntimeError(
            f"router={self.name!r} decides once a request, from the prompt; it needs the whole routed model, not "
            f"{layer.module!r} alone."
        )

    def prompt_logits(self, scores_BN: torch.Tensor, owners: list[int], num_experts: int) -> torch.Tensor:
        """Router logits, float32 (B, E), from the scores (B, N) of a linear map; `owners` are their experts."""
        raise NotImplementedError


class TaskPredictorRouter(PromptRouter):
    """The logits of a linear classifier over the prompt's features, trained to tell the experts' data apart.

    TP of arXiv 2405.11157, section 4.2, whose classifier is a T5 encoder; here the base model itself encodes. The
    paper's code keeps one expert: `top_k=1`.
    """

    name = "task_predictor"
    paper = "https://arxiv.org/abs/2405.11157"
    summary = "the logit of a trained classifier over the prompt"

    def prompt_logits(self, scores_BN: torch.Tensor, owners: list[int], num_experts: int) -> torch.Tensor:
        """Router logits, float32 (B, E): the scores themselves, one an expert."""
        return scores_BN


class RetrievalRouter(PromptRouter):
    """The cosine of the prompt's features with the nearest, or the mean of all, of an expert's examples.

    The rule of arXiv 2601.21795 (there: the mean of at most 200 examples, softmax at 0.2, three experts) with the base
    model as the sentence encoder; the mean over all examples is taken from the features first.
    """

    name = "retrieval"
    paper = "https://arxiv.org/abs/2601.21795"
    summary = "the cosine of the prompt with the expert's examples"
    options = {"score": Option("nearest", ("nearest", "mean"), "of the examples of an expert")}

    def prompt_logits(self, scores_BN: torch.Tensor, owners: list[int], num_experts: int) -> torch.Tensor:
        """Router logits, float32 (B, E)."""
        owners_BN = torch.tensor(owners, device=scores_BN.device).expand(scores_BN.shape)
        logits_BE = scores_BN.new_zeros(scores_BN.shape[0], num_experts)
        reduce = "amax" if self.chosen["score"] == "nearest" else "mean"
        return logits_BE.scatter_reduce(1, owners_BN, scores_BN, reduce, include_self=False)
