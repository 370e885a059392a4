"""What fitting a router gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .heads import PromptHead


@dataclass(frozen=True)
class Fitted:
    """What a router learnt.

    Args:
        rows (`dict[str, torch.Tensor]`): module -> float32 (E, I), one row an expert of the module.
        head (`PromptHead`, *optional*): of a prompt-level router.
        info (`dict`): for the config; JSON.
    """

    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    head: PromptHead | None = None
    info: dict[str, Any] = field(default_factory=dict)


def fitted_head(head: PromptHead, **info: Any) -> Fitted:
    """A prompt-level router's map, with the shape that a checkpoint needs to make room for it."""
    scores, features = head.weight.shape
    return Fitted(head=head, info={"scores": scores, "features": features, **info})
