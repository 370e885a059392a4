"""Log-likelihoods of what may follow a prompt: one forward pass serves every measure that is made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from .batches import (
    TOKEN_BUDGET,
    Around,
    batches_by_length,
    nothing_around,
    padded,
    prompt_routing,
    takes_logits_to_keep,
)
from .encoding import Encoded, TooLong, context_limit, encode


@dataclass(frozen=True)
class OptionScore:
    """The log-likelihoods of one continuation, in nats.

    Args:
        loglik (`float`): of the continuation without an end token, as lm-eval-harness splits.
        tokens (`int`): those that `loglik` is the sum over.
        is_greedy (`bool`): whether greedy decoding would write these tokens.
        answer_loglik (`float`): of the tokens behind those of the prompt alone, without the end token.
        answer_tokens (`int`): those that `answer_loglik` is the sum over.
        end_loglik (`float`): of the end token behind them.
        cut (`int`): tokens of the prompt that were cut off.
    """

    loglik: float
    tokens: int
    is_greedy: bool
    answer_loglik: float
    answer_tokens: int
    end_loglik: float
    cut: int = 0

    @property
    def mean_nll(self) -> float:
        """Nats per token of the answer, the end token included: the loss in training, and the paper's score."""
        return -(self.answer_loglik + self.end_loglik) / (self.answer_tokens + 1)


def score_options(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Any],
    *,
    batch_size: int | None = None,
    token_budget: int = TOKEN_BUDGET,
    truncate: bool = False,
    around: Around = nothing_around,
    on_batch: Callable[[int], Any] | None = None,
) -> list[list[OptionScore]]:
    """Score every option of every item as the continuation of its prompt.

    How prompt and option are joined: the text is `prompt + option`, nothing is put between them, so a space that
    belongs there is part of the option. That text is encoded whole, with the special tokens that the tokenizer adds by
    itself. Where the option begins in it is answered twice, because two rules are in use:

    - lm-eval-harness moves white space at the end of the prompt into the continuation and takes what is behind the
      tokens of the prompt without it: `loglik`, `tokens`, `is_greedy`.
    - TRL (and arXiv 2405.11157's code) takes what is behind the tokens of the prompt as it is, and the end token
      after it: `answer_loglik`, `answer_tokens`, `end_loglik`.

    Without white space at the end of the prompt they are the same tokens.

    Args:
        model (`torch.nn.Module`): a causal language model in eval mode, routed or not.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        items (`Sequence`): each with `prompt` (`str`) and `options` (`Sequence[str]`), as attributes or keys; with a
            true `is_templated` the prompt brings its special tokens itself.
        batch_size (`int`, *optional*): most options of a batch.
        token_budget (`int`): most tokens of a batch, padding included.
        truncate (`bool`): cut prompts that do not fit on the left.
        around (`Callable`): rows of a batch -> what is open while the model reads it.
        on_batch (`Callable`, *optional*): is told the number of options of each batch that is done.

    Returns:
        `list[list[OptionScore]]`: per item, per option. Batches change the values by rounding only.

    Raises:
        TooLong: prompt and option have more tokens than the model's context; the message names the item.
    """
    encoded = _encode_items(tokenizer, items, context_limit(model), truncate)
    pairs = [pair for options in encoded for pair in options]
    scores = iter(score_encoded(model, pairs, batch_size, token_budget, around, on_batch))
    return [[next(scores) for _ in options] for options in encoded]


def _encode_items(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Any], limit: int | None, truncate: bool
) -> list[list[Encoded]]:
    encoded = []
    for number, item in enumerate(items):
        prompt, options, is_templated = _parts(item)
        rules = {"is_templated": is_templated, "limit": limit, "truncate": truncate}
        try:
            encoded.append([encode(tokenizer, prompt, option, **rules) for option in options])
        except TooLong as error:
            raise TooLong(f"item {number} {error}; truncate=True cuts prompts on the left.") from error
    return encoded


def _parts(item: Any) -> tuple[str, Sequence[str], bool]:
    if isinstance(item, Mapping):
        return item["prompt"], item["options"], bool(item.get("is_templated", False))
    return item.prompt, item.options, bool(getattr(item, "is_templated", False))


@torch.no_grad()
def score_encoded(
    model: torch.nn.Module,
    encoded: Sequence[Encoded],
    batch_size: int | None = None,
    token_budget: int = TOKEN_BUDGET,
    around: Around = nothing_around,
    on_batch: Callable[[int], Any] | None = None,
) -> list[OptionScore]:
    """Score encoded pairs in batches by length; arguments as for [`score_options`].

    The rows are padded on the right, where a causal model does not look, and logits are computed from the first
    continuation of the batch on.
    """
    device = next(model.parameters()).device
    keeps = takes_logits_to_keep(model)
    found: list[OptionScore | None] = [None] * len(encoded)
    for batch in batches_by_length([len(pair.ids) for pair in encoded], token_budget, batch_size):
        pairs = [encoded[place] for place in batch]
        ids, mask = padded([pair.ids for pair in pairs], "right", pairs[0].ids[-1], device)
        first = min(pair.context for pair in pairs) - 1
        kept = {"logits_to_keep": torch.arange(first, ids.shape[1] - 1, device=device)} if keeps else {}
        before = torch.tensor([pair.prompt for pair in pairs], device=device)
        prompt_mask = torch.arange(ids.shape[1], device=device) < before[:, None]
        with around(len(batch)), prompt_routing(model, prompt_mask):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **kept).logits
        logits = logits if keeps else logits[:, first:-1]
        for line, place in enumerate(batch):
            found[place] = _read_off(logits[line], ids[line], encoded[place], first)
        if on_batch is not None:
            on_batch(len(batch))
    return found


def _read_off(logits: torch.Tensor, ids: torch.Tensor, pair: Encoded, first: int) -> OptionScore:
    """The score of one row of a batch; `logits` (P, V) are those at the positions from `first` on."""
    targets = ids[pair.context : len(pair.ids)]
    part = logits[pair.context - 1 - first : len(pair.ids) - 1 - first].float()
    nats = cross_entropy(part, targets, reduction="none").double().cpu()
    greedy = (part.argmax(-1) == targets)[:-1].all()
    skipped = pair.prompt - pair.context
    return OptionScore(
        loglik=-nats[:-1].sum().item(),
        tokens=len(nats) - 1,
        is_greedy=bool(greedy),
        answer_loglik=-nats[skipped:-1].sum().item(),
        answer_tokens=len(nats) - 1 - skipped,
        end_loglik=-nats[-1].item(),
        cut=pair.cut,
    )
