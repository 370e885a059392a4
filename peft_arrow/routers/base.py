"""The contract of a router: layer inputs in, chosen experts and their weights out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class Routing:
    """The experts that each token of one layer goes to.

    Args:
        top_k_index (`torch.Tensor`): int64 (T, K), positions among the experts of the layer.
        top_k_weights (`torch.Tensor`): float32 (T, K), each row sums to 1.
    """

    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor

    def dense(self, num_experts: int) -> torch.Tensor:
        """The weights as float32 (T, E), 0 where an expert is not chosen."""
        weights_TE = self.top_k_weights.new_zeros(self.top_k_index.shape[0], num_experts)
        return weights_TE.scatter(1, self.top_k_index, self.top_k_weights)


class Router(ABC):
    """Scores the experts of a layer for every token; the selection is shared by all routers.

    Args:
        top_k (`int`): experts kept for a token; more than there are means all of them.
        temperature (`float`): divides the kept scores before the softmax over them.

    Attributes:
        name (`str`): the key in `ROUTERS`.
        paper (`str`): where the rule is from.
        uses_prototypes (`bool`): whether `project` is called, so that prototypes must be up to date.
        uses_all (`bool`): whether every expert gets a weight, whatever `top_k` says.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    uses_prototypes: ClassVar[bool] = False
    uses_all: ClassVar[bool] = False

    def __init__(self, top_k: int = 4, temperature: float = 1.0) -> None:
        self.top_k = top_k
        self.temperature = temperature

    @abstractmethod
    def score(
        self, x_TI: torch.Tensor, project: Callable[[torch.Tensor], torch.Tensor], num_experts: int
    ) -> torch.Tensor:
        """Router logits, float32 (T, E).

        Args:
            x_TI (`torch.Tensor`): layer inputs (T, I) in the dtype of the base.
            project (`Callable`): (T, I) -> float32 (T, E), the dot product of each input with each prototype.
            num_experts (`int`): E, the experts that have this module.
        """

    def route(self, x_TI: torch.Tensor, project: Callable[[torch.Tensor], torch.Tensor], num_experts: int) -> Routing:
        """Score and select; arguments as for `score`."""
        return select(self.score(x_TI, project, num_experts), self.top_k, self.temperature)


def select(logits_TE: torch.Tensor, top_k: int, temperature: float) -> Routing:
    """Keep the `top_k` largest scores of each token; their softmax at `temperature` gives the weights.

    The largest score is subtracted before the division, so that a temperature near 0 ends in the argmax, not in
    overflow (arXiv 2405.11157, Algorithm 2: softmax over the kept scores only).
    """
    top_TK, index_TK = torch.topk(logits_TE, min(top_k, logits_TE.shape[-1]), dim=-1)
    temperature = max(temperature, torch.finfo(torch.float32).tiny)
    weights_TK = torch.softmax((top_TK - top_TK[:, :1]) / temperature, dim=-1)
    return Routing(index_TK, weights_TK)
