"""Mean inputs of every module over each expert's data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from .fitted import Fitted
from .hooks import reading_inputs
from .rows import Example, batches


POOLS = ("mean", "last")


@torch.no_grad()
def centroids(
    model: Any, examples: Mapping[str, Sequence[Example]], *, pool: str = "mean", batch_size: int = 8
) -> Fitted:
    """Per module the mean input over expert i's rows with that expert active, at length 1 (arXiv 2405.11157, 4.2).

    Args:
        model (`ArrowLoraModel`): the routed model.
        examples (`Mapping`): expert -> rows, for every expert in order.
        pool (`str`): `"mean"` over all tokens, or `"last"`: the last token of each row, as the paper's code can.
        batch_size (`int`): rows at a time.

    Returns:
        `Fitted`: with the rows.
    """
    if pool not in POOLS:
        raise ValueError(f"pool={pool!r} is unknown; allowed are {list(POOLS)}.")
    adapter_name, names = model.active_arrow_adapter(), list(model.expert_names)
    layers = model.routed_layers(adapter_name)
    sums = {
        name: torch.zeros(len(layer.experts[adapter_name].positions), layer.in_features, dtype=torch.float64)
        for name, layer in layers.items()
    }
    device = next(model.model.parameters()).device
    for expert, rows in tqdm(examples.items(), desc="centroids", unit="expert"):
        position = names.index(expert)
        mine = {name: layer for name, layer in layers.items() if position in layer.experts[adapter_name].positions}
        for ids, mask, _ in batches(rows, batch_size, device):
            kept = mask if pool == "mean" else mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))

            def read(name, layer, x, kept=kept, position=position):
                row = layer.experts[adapter_name].positions.index(position)
                sums[name][row] += x.reshape(-1, x.shape[-1])[kept.flatten()].double().sum(0).cpu()

            with model.pin_experts([expert] * len(ids)), reading_inputs(mine, read):
                model.model(input_ids=ids, attention_mask=mask.long())
    return Fitted({name: torch.nn.functional.normalize(total, dim=-1).float() for name, total in sums.items()})
