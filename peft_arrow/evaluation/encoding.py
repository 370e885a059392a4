"""Prompt and continuation as tokens: where the one ends and the other begins, and what does not fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """A prompt and what follows it.

    Args:
        ids (`list[int]`): of both, and the end token.
        context (`int`): tokens before the continuation as lm-eval-harness splits: white space at the end of the
            prompt belongs to the continuation.
        prompt (`int`): tokens before the continuation as TRL splits: those of the prompt alone.
        cut (`int`): tokens that were cut off on the left because they do not fit.
    """

    ids: list[int]
    context: int
    prompt: int
    cut: int = 0


class TooLong(ValueError):
    """A prompt and its continuation have more tokens than the model's context."""


def context_limit(model: Any) -> int | None:
    """Tokens that the model can read, or None where its config does not say."""
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "max_position_embeddings", None)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    continuation: str,
    *,
    is_templated: bool = False,
    limit: int | None = None,
    truncate: bool = False,
) -> Encoded:
    """Encode both as one text; what is behind the tokens of the prompt alone is the continuation.

    Without a prompt the start token stands for it, or the end token where there is none (as in lm-eval-harness).

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with an end token.
        prompt, continuation (`str`): the texts.
        is_templated (`bool`): whether the prompt brings its special tokens itself.
        limit (`int`, *optional*): the model's context in tokens.
        truncate (`bool`): cut the prompt on the left instead of raising (arXiv 2405.11157's code does).

    Raises:
        TooLong: they have more than `limit` tokens, and `truncate` is False or the continuation alone is longer.
    """
    ids, context, before = _split(tokenizer, prompt, continuation, is_templated)
    ids = [*ids, end_token(tokenizer)]
    cut = max(len(ids) - limit, 0) if limit is not None else 0
    if cut and not truncate:
        raise TooLong(f"has {len(ids)} tokens with its answer, and the model's context has {limit}")
    if cut >= context:
        raise TooLong(f"has an answer of {len(ids) - context} tokens, and the model's context has {limit}")
    return Encoded(ids[cut:], context - cut, before - cut, cut)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    is_templated: bool = False,
    room: int | None = None,
    truncate: bool = False,
) -> tuple[list[int], int]:
    """The tokens of a prompt to be continued, and how many were cut off on the left.

    Args:
        tokenizer, prompt, is_templated, truncate: as in [`encode`].
        room (`int`, *optional*): the model's context less the tokens that are to be written.

    Raises:
        TooLong: the prompt has more than `room` tokens, and `truncate` is False or no room is left at all.
    """
    ids = _tokens(tokenizer, prompt, is_templated) or [prefix_token(tokenizer)]
    cut = max(len(ids) - room, 0) if room is not None else 0
    if cut and (not truncate or cut >= len(ids)):
        raise TooLong(f"has {len(ids)} tokens, and the model's context has room for {room} before the answer")
    return ids[cut:], cut


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the end-of-sequence token.

    Raises:
        ValueError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token, which the loss of an answer includes.")
    return tokenizer.eos_token_id


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands for an empty prompt: the start token, or the end token where there is none."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end_token(tokenizer)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, is_templated: bool) -> list[int]:
    has_start = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return tokenizer(text, add_special_tokens=not (is_templated or has_start))["input_ids"]


def _split(
    tokenizer: PreTrainedTokenizerBase, prompt: str, continuation: str, is_templated: bool
) -> tuple[list[int], int, int]:
    """The tokens of both, and how many are before the continuation: by lm-eval's rule, and by TRL's."""
    if not prompt.rstrip():
        first, ids = prefix_token(tokenizer), _tokens(tokenizer, prompt + continuation, True)
        ids = ids if ids and ids[0] == first else [first, *ids]
        return ids, 1, 1
    ids = _tokens(tokenizer, prompt + continuation, is_templated)
    context, before = (len(_tokens(tokenizer, text, is_templated)) for text in (prompt.rstrip(), prompt))
    before = min(before, len(ids) - 1)
    return ids, min(context, before), before
