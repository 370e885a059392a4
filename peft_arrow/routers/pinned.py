"""Pinned and oracle: the caller names the experts of each row."""

from __future__ import annotations

import torch

from .base import LayerInput, Router


class PinnedRouter(Router):
    """The experts that `model.pin_experts([...])` names for each row of the batch; no logits are computed."""

    name = "pinned"
    summary = "the caller names the experts of each row"
    is_pinned = True

    def score(self, layer: LayerInput) -> torch.Tensor:
        """There is nothing to score.

        Raises:
            RuntimeError: always; it is reached where no experts are pinned.
        """
        raise RuntimeError(
            f"router={self.name!r} routes to the experts that are named: call the model inside "
            "`with model.pin_experts([...]):`, one entry a batch row."
        )


class OracleRouter(PinnedRouter):
    """The expert of the task that a row is of, named by whoever knows it (arXiv 2405.11157, figure 3)."""

    name = "oracle"
    paper = "https://arxiv.org/abs/2405.11157"
    summary = "the task's own expert, named by whoever knows the task"
