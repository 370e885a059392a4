"""The work that is timed: a prefill, decoding with a cache, a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from .machine import stopwatch
from .rounds import Times, blocks_in_turn, in_turn
from .side import Side, too_much


# Largest difference of a compiled or captured model's logits, relative to the largest logit: close choices may flip.
OTHER_MODE = 0.05


@torch.no_grad()
def prefill(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the last token, (batch, vocabulary)."""
    return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]


def time_prefill(
    sides: Sequence[Side], ids: torch.Tensor, repeats: int, slow: float, budget: int, mode: Callable | None = None
) -> Times:
    """Prefill of `ids`, all sides in turn.

    Args:
        sides (`Sequence[Side]`): what runs.
        ids (`torch.Tensor`): int64 (batch, tokens).
        repeats (`int`): rounds.
        slow (`float`): seconds above which a side runs once.
        budget (`int`): bytes that the forward of another side may need inside one layer.
        mode (`Callable`, *optional*): side, ids -> a call that runs the prefill in another way, see `modes`.
    """
    absent, calls = {}, {}
    for side in sides:
        missing = too_much(side.needs(ids.numel()), budget)
        if missing:
            absent[side.name] = missing
            continue
        try:
            run = lambda side=side: prefill(side.model, ids)  # noqa: E731
            if mode:
                side.prepare()
                expected, run = run(), mode(side, ids)
                apart = float((run() - expected).abs().max() / expected.abs().max())
                if apart > OTHER_MODE:
                    absent[side.name] = f"differs from itself as is by {apart:.1e} of the largest logit: not timed"
                    continue
        except RuntimeError as error:
            absent[side.name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue

        def call(side: Side = side, run: Callable = run) -> float:
            side.prepare()
            return stopwatch(run, ids.device)

        calls[side.name] = call
    times = in_turn(calls, repeats, slow)
    times.absent.update(absent)
    return times


@torch.no_grad()
def decode(side: Side, ids: torch.Tensor, prompt: int, block: int) -> Iterator[float]:
    """Read `prompt` tokens of `ids`, then one token after the other; yield the seconds a token of each block."""
    side.prepare()
    cache = side.model(input_ids=ids[:, :prompt], use_cache=True, logits_to_keep=1).past_key_values
    for start in range(prompt, ids.shape[1], block):
        tokens = ids[:, start : start + block]

        def steps(tokens: torch.Tensor = tokens) -> None:
            with torch.no_grad():
                for token in tokens.unbind(1):
                    side.model(input_ids=token[:, None], past_key_values=cache, use_cache=True)

        side.prepare()
        yield stopwatch(steps, ids.device) / tokens.shape[1]


def time_decode(sides: Sequence[Side], ids: torch.Tensor, prompt: int, block: int, repeats: int, slow: float) -> Times:
    """Decoding of `ids` after a prompt, all sides in turn, block by block; seconds a token."""
    cached = {side.name: side for side in sides if side.has_cache}
    starts = {name: lambda side=side: decode(side, ids, prompt, block) for name, side in cached.items()}
    times = blocks_in_turn(starts, repeats, slow / block)
    times.absent.update({side.name: "decodes without a cache: not run" for side in sides if not side.has_cache})
    return times


def model_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The language-modelling loss of `ids`."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> torch.Tensor:
    """Forward, loss, backward and AdamW; the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = model_loss(model, ids)
    loss.backward()
    optimizer.step()
    return loss.detach()


def time_training(sides: Sequence[Side], ids: torch.Tensor, repeats: int, slow: float) -> Times:
    """A training step on `ids`, all sides in turn."""
    calls = {}
    for side in sides:
        trained = [parameter for parameter in side.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5)

        def call(side: Side = side, optimizer: torch.optim.Optimizer = optimizer) -> float:
            side.prepare()
            return stopwatch(lambda: training_step(side.model, optimizer, ids), ids.device)

        calls[side.name] = call
    return in_turn(calls, repeats, slow)
