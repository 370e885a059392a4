"""How much weight Arrow gives each expert on a task's own rows, module by module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..evaluation.batches import batches_by_length, padded
from ..library.adapter import Adapter
from ..tuner import ArrowLoraModel


def arrow_weights(
    base: PreTrainedModel, members: Sequence[Adapter], token_rows: Sequence[Sequence[int]], *, top_k: int
) -> dict[str, list[float]]:
    """The mean over tokens of Arrow's weights (arXiv 2405.11157, section 4.1).

    Args:
        base (`PreTrainedModel`): the base model; it is as before afterwards.
        members (`Sequence[Adapter]`): the experts.
        token_rows (`Sequence[Sequence[int]]`): the ids of some rows.
        top_k (`int`): experts a token.

    Returns:
        `dict[str, list[float]]`: module -> a weight for each expert, sum 1; one that lacks the module has 0.
    """
    model = ArrowLoraModel.from_pretrained(base, {member.name: member for member in members}, top_k=top_k)
    try:
        with torch.no_grad(), model.trace_routing() as trace:
            for batch in batches_by_length([len(row) for row in token_rows]):
                ids, mask = padded([token_rows[place] for place in batch], "right", 0, base.device)
                model(input_ids=ids, attention_mask=mask, use_cache=False)
        return {module: list(shares) for module, shares in trace.shares("module").items()}
    finally:
        model.unload()
