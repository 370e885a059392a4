"""Batches by length, and what a forward pass of one is wrapped in."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch


TOKEN_BUDGET = 2048
# Rows of a batch -> what is open while the model reads it, such as `model.pin_experts([name] * rows)`.
Around = Callable[[int], AbstractContextManager]


def nothing_around(rows: int) -> AbstractContextManager:
    """Nothing is open while the model reads a batch."""
    return contextlib.nullcontext()


def batches_by_length(
    lengths: Sequence[int], token_budget: int = TOKEN_BUDGET, batch_size: int | None = None
) -> Iterator[list[int]]:
    """Positions of `lengths` in batches, longest first; rows x longest row is at most `token_budget`.

    Args:
        lengths (`Sequence[int]`): tokens of each row.
        token_budget (`int`): tokens of a batch, padding included; a longer row is a batch alone.
        batch_size (`int`, *optional*): most rows of a batch.
    """
    batch: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        is_full = batch and (len(batch) + 1) * lengths[batch[0]] > token_budget
        if is_full or len(batch) == batch_size:
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch


def padded(
    rows: Sequence[Sequence[int]], side: str, fill: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, S) and mask (B, S), padded on the `side` "left" or "right" with the id `fill`."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), fill, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        part = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[place, part] = torch.tensor(row)
        mask[place, part] = 1
    return ids.to(device), mask.to(device)


def takes_logits_to_keep(model: torch.nn.Module) -> bool:
    """Whether the base's forward computes logits at chosen positions only."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def prompt_routing(model: Any, prompt_mask: torch.Tensor) -> AbstractContextManager:
    """Open while only the prompt's tokens, a mask (B, S), may decide between experts; nothing for a plain model."""
    return model.routing_prompt(prompt_mask) if hasattr(model, "routing_prompt") else contextlib.nullcontext()
