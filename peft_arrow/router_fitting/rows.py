"""Rows of data as token ids, and batches of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer

from ..prompts import instruction_prompt


ALLOWED = "'prompt' and 'completion', 'messages', 'instruction' (with or without 'input') and 'output', or 'text'"


@dataclass(frozen=True)
class Example:
    """One row.

    Args:
        ids (`list[int]`): prompt, completion and end token.
        prompt (`int`): how many of them are the prompt's.
    """

    ids: list[int]
    prompt: int


def tokenizer_of(base: Any) -> Any:
    """The tokenizer that lies where the base model was loaded from.

    Raises:
        ValueError: there is none.
    """
    name = getattr(base.config, "_name_or_path", None)
    try:
        if not name:
            raise ValueError("the base has no name")
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer=None, and none is found at the base's {name!r} ({error}); pass one.") from error


def read_datasets(
    datasets: Mapping[str, Any], experts: Sequence[str], tokenizer: Any, max_rows: int, max_length: int
) -> dict[str, list[Example]]:
    """The first `max_rows` rows of each expert, in the order of the experts; longer ones lose their beginning.

    Raises:
        ValueError: an expert has no rows, a name is no expert, or a row has other columns.
    """
    if not isinstance(datasets, Mapping):
        raise ValueError(f"datasets is a {type(datasets).__name__}; it is a mapping from expert names to rows.")
    for name in datasets:
        if name not in experts:
            raise ValueError(f"datasets holds {name!r}, which is not an expert; experts are {list(experts)}.")
    found = {}
    for name in experts:
        rows = datasets.get(name, ())
        if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
            raise ValueError(f"datasets[{name!r}] is a {type(rows).__name__}; it is a Dataset or a list of rows.")
        taken = [row for row, _ in zip(rows, range(max_rows), strict=False)]
        if not taken:
            raise ValueError(f"datasets has no rows for expert {name!r}; every expert needs some.")
        found[name] = [_example(name, place, row, tokenizer, max_length) for place, row in enumerate(taken)]
    return found


def _example(name: str, place: int, row: Any, tokenizer: Any, max_length: int) -> Example:
    if not isinstance(row, Mapping):
        raise ValueError(f"row {place} of {name!r} is a {type(row).__name__}; a row is a dict with {ALLOWED}.")
    prompt, whole = _texts(name, place, row, tokenizer)
    ids = list(whole) + ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
    cut = max(len(ids) - max_length, 0)
    ids, prompt = ids[cut:], max(len(prompt) - cut, 1)
    if len(ids) < 2:
        raise ValueError(f"row {place} of {name!r} has no tokens.")
    return Example(ids, min(prompt, len(ids) - 1))


def _texts(name: str, place: int, row: Mapping[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids of the prompt, and of prompt and completion."""
    if "messages" in row or not isinstance(row.get("prompt", ""), str):
        messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
        head = row["prompt"] if "messages" not in row else messages[:-1]
        options = {"tokenize": True, "return_dict": True}
        whole = tokenizer.apply_chat_template(messages, **options)["input_ids"]
        return tokenizer.apply_chat_template(head, add_generation_prompt=True, **options)["input_ids"], whole
    if "text" in row:
        ids = tokenizer(row["text"])["input_ids"]
        return ids, ids
    if "prompt" in row and "completion" in row:
        head, tail = row["prompt"], row["completion"]
    elif "instruction" in row and "output" in row:
        head, tail = instruction_prompt(row["instruction"], row.get("input")), row["output"]
    else:
        raise ValueError(f"row {place} of {name!r} has the columns {sorted(row)}; allowed are {ALLOWED}.")
    head_ids = list(tokenizer(head)["input_ids"])
    return head_ids, head_ids + list(tokenizer(tail, add_special_tokens=False)["input_ids"])


def batches(
    examples: Sequence[Example], size: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(ids, attention mask, prompt mask), each (B, S), padded on the right with id 0."""
    for start in range(0, len(examples), size):
        chunk = examples[start : start + size]
        length = max(len(example.ids) for example in chunk)
        ids = torch.tensor([example.ids + [0] * (length - len(example.ids)) for example in chunk], device=device)
        places = torch.arange(length, device=device)
        ends = torch.tensor([len(example.ids) for example in chunk], device=device)
        prompts = torch.tensor([example.prompt for example in chunk], device=device)
        yield ids, places < ends[:, None], places < prompts[:, None]
