"""Mean and spread of router logits on text that the base model writes."""

from __future__ import annotations

from typing import Any

import torch
from tqdm.auto import tqdm

from .hooks import reading_inputs


@torch.no_grad()
def calibrate(
    model: Any, adapter_name: str, *, sequences: int, length: int, batch_size: int, seed: int
) -> dict[str, torch.Tensor]:
    """Per module and expert the mean and standard deviation of the router's logits, as the base alone runs.

    Args:
        model (`ArrowLoraModel`): the routed model.
        adapter_name (`str`): the PEFT adapter.
        sequences, length, batch_size, seed (`int`): see `ArrowLoraModel.calibrate_router`.

    Returns:
        `dict[str, torch.Tensor]`: module -> float32 (E, 2).

    Raises:
        ValueError: a number is not allowed, the base cannot generate, or the router scores no tokens.
    """
    for name, value, least in (
        ("sequences", sequences, 1),
        ("length", length, 2),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} is not allowed; it is a whole number of at least {least}.")
    layers = model.routed_layers(adapter_name)
    router = next(iter(layers.values())).routers[adapter_name]
    if router.is_pinned or router.is_prompt_level or router.uses_all:
        raise ValueError(
            f"router={router.name!r} does not score tokens by their experts, so there is nothing to calibrate."
        )
    sums = {
        name: torch.zeros(3, len(layer.experts[adapter_name].positions), dtype=torch.float64)
        for name, layer in layers.items()
    }

    def read(name, layer, x):
        logits_TE = layer.raw_logits(adapter_name, x.reshape(-1, x.shape[-1])).double().cpu()
        finite = torch.isfinite(logits_TE)
        values = torch.where(finite, logits_TE, 0.0)
        sums[name] += torch.stack([finite.double().sum(0), values.sum(0), values.square().sum(0)])

    with model.bare():
        for start in tqdm(range(0, sequences, batch_size), desc="calibrating", unit="batch", leave=False):
            ids = _written(model.model, min(batch_size, sequences - start), length, seed + start)
            with reading_inputs(layers, read):
                model.model(input_ids=ids)
    return {name: _moments(total) for name, total in sums.items()}


def _written(base: Any, count: int, length: int, seed: int) -> torch.Tensor:
    """Text of the base model from its first token on, sampled; (count, length)."""
    config = base.generation_config if hasattr(base, "generation_config") else None
    starts = [
        getattr(source, name, None) for source in (config, base.config) for name in ("bos_token_id", "eos_token_id")
    ]
    start = next((token for token in starts if token is not None), None)
    if start is None or not hasattr(base, "generate") or base.config.is_encoder_decoder:
        raise ValueError("calibrate_router needs a decoder that generates and has a first or an end token.")
    start = start[0] if isinstance(start, (list, tuple)) else start
    device = next(base.parameters()).device
    ids = torch.full((count, 1), start, device=device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return base.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=length - 1,
            max_new_tokens=length - 1,
            use_cache=True,
        )


def _moments(sums_3E: torch.Tensor) -> torch.Tensor:
    """(E, 2): mean and standard deviation; an expert that never varies keeps its logit's scale."""
    count_E, total_E, squares_E = sums_3E
    count_E = count_E.clamp_min(1.0)
    mean_E = total_E / count_E
    spread_E = (squares_E / count_E - mean_E.square()).clamp_min(0.0).sqrt()
    spread_E = torch.where(spread_E > 1e-8, spread_E, torch.ones_like(spread_E))
    return torch.stack([mean_E, spread_E], dim=-1).float()
