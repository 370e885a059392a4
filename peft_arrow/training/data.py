"""Rows for an expert: where they are read from, which columns they may have, and the form that TRL takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from ..prompts import instruction_prompt
from .reading import DatasetLike, load_rows, without_bars


ALLOWED = "'prompt' and 'completion', 'messages', 'instruction' (with or without 'input') and 'output', or 'text'"
# A dataset is of the format whose first column it has; then it has to have the others too.
FORMATS = {
    "prompt": ("prompt", "completion"),
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
LEARNT = ("completion", "output", "text")


@dataclass(frozen=True)
class Examples:
    """The checked rows of one expert.

    Args:
        name (`str`): the expert's name.
        dataset (`Dataset`): columns `prompt` and `completion`, as texts or as chat messages, or `text`.
        fingerprint (`str`): of the rows' content and order.
        tasks (`tuple[str, ...]`): the tasks whose rows these are.
        sources (`tuple[str, ...]`): Hub ids of the datasets, where they are from the Hub.
    """

    name: str
    dataset: Dataset = field(repr=False)
    fingerprint: str
    tasks: tuple[str, ...]
    sources: tuple[str, ...] = ()


def read_examples(name: str, source: DatasetLike) -> Examples:
    """Read and check the rows of one task.

    Args:
        name (`str`): the task's name, for messages and for the expert.
        source:
            a `Dataset`, a Hub id, a list of rows, a file (.jsonl, .json, .csv, .parquet), a folder with such files, or
            one of `Dataset.save_to_disk`. Where a column `split` says so, only rows of `train` are taken.

    Raises:
        ValueError: nothing readable is there, no rows, a missing column, or one that is empty or of another kind.
        ConnectionError: the Hub cannot be reached.
    """
    with without_bars():
        rows = load_rows(name, source)
        if "split" in rows.column_names and "train" in rows.unique("split"):
            rows = rows.filter(lambda split: split == "train", input_columns="split")
        if len(rows) == 0:
            raise ValueError(f"dataset {name!r} is empty; training needs at least one row.")
        dataset = _as_trl_takes_it(name, rows)
    is_on_hub = isinstance(source, str) and not Path(source).expanduser().exists()
    return Examples(name, dataset, fingerprint(dataset), (name,), (source,) if is_on_hub else ())


def joined(name: str, parts: list[Examples]) -> Examples:
    """The rows of several tasks one after another, for one expert; natural mixing, the trainer shuffles them.

    Raises:
        ValueError: some of the tasks are chats or texts and others not.
    """
    kinds = {part.name: kind_of(part.dataset) for part in parts}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"datasets of group {name!r} are of different kinds, {kinds}; one expert needs one kind.")
    dataset = concatenate_datasets([part.dataset for part in parts]) if len(parts) > 1 else parts[0].dataset
    digest = hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest()
    whole = parts[0].fingerprint if len(parts) == 1 else digest
    sources = tuple(dict.fromkeys(source for part in parts for source in part.sources))
    return Examples(name, dataset, whole, tuple(task for part in parts for task in part.tasks), sources)


def kind_of(dataset: Dataset) -> str:
    """`text`, `prompt and completion`, or `chat`."""
    if "text" in dataset.column_names:
        return "text"
    return "prompt and completion" if isinstance(dataset[0]["prompt"], str) else "chat"


def fingerprint(dataset: Dataset) -> str:
    """sha256 of the rows, whatever file or cache they came from."""
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()


def check_lengths(examples: Examples, tokenizer: Any, max_length: int | None) -> None:
    """Refuse rows that do not fit: TRL cuts the end, which is what is to be learnt.

    Raises:
        ValueError: a completion, or a prompt with its completion, has more than `max_length` tokens.
    """
    if max_length is None or kind_of(examples.dataset) == "text":
        return
    for position, row in enumerate(examples.dataset):
        if isinstance(row["prompt"], str):
            completion = len(tokenizer(row["completion"])["input_ids"]) + 1  # the end token that TRL adds
            whole = len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1
        else:
            template = {"tokenize": True, "return_dict": True}
            completion = len(tokenizer.apply_chat_template(row["completion"], **template)["input_ids"])
            whole = len(tokenizer.apply_chat_template(row["prompt"] + row["completion"], **template)["input_ids"])
        if whole > max_length:
            part, count = ("completion", completion) if completion > max_length else ("prompt and completion", whole)
            raise ValueError(
                f"dataset {examples.name!r}: the {part} of row {position} has {count} tokens, and max_length is "
                f"{max_length}; leave such rows out, or allow more with sft_config={{'max_length': ...}}."
            )


def _as_trl_takes_it(name: str, rows: Dataset) -> Dataset:
    columns = rows.column_names
    first = next((column for column in FORMATS if column in columns), None)
    if first is None:
        raise ValueError(f"dataset {name!r} has the columns {columns}; allowed are {ALLOWED}.")
    for column in FORMATS[first]:
        if column not in columns:
            raise ValueError(f"dataset {name!r} has no column {column!r}, only {columns}; allowed are {ALLOWED}.")
    _check_values(name, rows, FORMATS[first])
    if first == "messages":
        return rows.map(lambda row: _last_answer(row["messages"]), remove_columns=columns)
    if first == "instruction":
        return rows.map(_instruction, remove_columns=columns)
    return rows.select_columns(list(FORMATS[first]))


def _check_values(name: str, rows: Dataset, columns: tuple[str, ...]) -> None:
    for column in columns:
        kind, is_chat = type(rows[0][column]), column == "messages"
        wanted = "a chat that ends with a message of the assistant" if is_chat else "a text, or in all rows messages"
        allowed = (list,) if is_chat else (str, list) if "completion" in columns else (str,)
        for position, value in enumerate(rows[column]):
            is_good = isinstance(value, allowed) and type(value) is kind
            if not is_good or (is_chat and not _ends_with_an_answer(value)):
                told = str(value)[:60]
                raise ValueError(
                    f"dataset {name!r}: column {column!r} of row {position} is {told!r}; it must be {wanted}."
                )
            if column in LEARNT and not value:
                raise ValueError(
                    f"dataset {name!r}: column {column!r} of row {position} is empty, so there is nothing to learn; "
                    "leave such rows out."
                )


def _ends_with_an_answer(messages: list) -> bool:
    return len(messages) > 1 and isinstance(messages[-1], Mapping) and messages[-1].get("role") == "assistant"


def _last_answer(messages: list) -> dict[str, list]:
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def _instruction(row: Mapping[str, Any]) -> dict[str, str]:
    return {"prompt": instruction_prompt(row["instruction"], row.get("input")), "completion": row["output"]}
