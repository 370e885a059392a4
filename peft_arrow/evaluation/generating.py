"""Greedy answers to prompts, in batches by length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .batches import TOKEN_BUDGET, Around, batches_by_length, nothing_around, padded
from .encoding import end_token


@torch.no_grad()
def generate_answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    until: Sequence[str] = (),
    batch_size: int | None = None,
    token_budget: int = TOKEN_BUDGET,
    around: Around = nothing_around,
    on_batch: Callable[[int], Any] | None = None,
) -> list[str]:
    """What greedy decoding writes after each prompt, up to the end token or `max_new_tokens`.

    Args:
        model (`torch.nn.Module`): a causal language model in eval mode.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        prompts (`Sequence[Sequence[int]]`): the prompts' tokens.
        max_new_tokens (`int`): most tokens of an answer.
        until (`Sequence[str]`): an answer ends before the first of these texts.
        batch_size, token_budget, around, on_batch: as for `score_options`; answers count as `max_new_tokens`.
    """
    device = next(model.parameters()).device
    answers = [""] * len(prompts)
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    for batch in batches_by_length(lengths, token_budget, batch_size):
        ids, mask = padded([prompts[place] for place in batch], "left", end_token(tokenizer), device)
        with around(len(batch)):
            written = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                eos_token_id=end_token(tokenizer),
                pad_token_id=end_token(tokenizer),
            )
        texts = tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
        for place, text in zip(batch, texts, strict=True):
            answers[place] = cut_at(text, until)
        if on_batch is not None:
            on_batch(len(batch))
    return answers


def cut_at(text: str, until: Sequence[str]) -> str:
    """The text before the first of `until`."""
    ends = [place for place in map(text.find, until) if place >= 0]
    return text[: min(ends)] if ends else text
