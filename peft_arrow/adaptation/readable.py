"""A task's training rows as the judge reads rows: prompt and completion as texts."""

from __future__ import annotations

from typing import Any

from ..evaluation.rows import Row, read_row
from ..evaluation.tasks import evenly
from ..training.data import Examples, kind_of


def readable_rows(examples: Examples, tokenizer: Any, count: int, method: str) -> list[Row]:
    """At most `count` rows at even distances; chats are rendered.

    Raises:
        ValueError: the rows are plain texts, which have no completion.
    """
    if kind_of(examples.dataset) == "text":
        raise ValueError(
            f"method={method!r} reads prompts and completions, and dataset {examples.name!r} is of texts."
        )
    chosen = evenly(range(len(examples.dataset)), count)
    where = f"dataset {examples.name!r}, row"
    return [read_row(examples.dataset[place], f"{where} {place}", tokenizer) for place in chosen]
