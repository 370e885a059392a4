"""A task's training rows as the judge reads rows: prompt and completion as tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..evaluation.encoding import Encoded, context_limit, encode
from ..evaluation.rows import read_row
from ..evaluation.tasks import evenly
from ..training.data import kind_of


if TYPE_CHECKING:
    from .methods import Task


def encoded_rows(task: Task, count: int, method: str) -> list[Encoded]:
    """At most `count` rows at even distances as tokens; chats are rendered.

    Raises:
        ValueError: the rows are plain texts, which have no completion.
        TooLong: a row is longer than the model's context.
    """
    dataset, tokenizer = task.examples.dataset, task.base.tokenizer
    where = f"dataset {task.examples.name!r}, row"
    if kind_of(dataset) == "text":
        raise ValueError(
            f"method={method!r} reads prompts and completions, and dataset {task.examples.name!r} is of texts."
        )
    rows = [read_row(dataset[place], f"{where} {place}", tokenizer) for place in evenly(range(len(dataset)), count)]
    limit = context_limit(task.base.model)
    return [encode(tokenizer, row.prompt, row.completion, is_templated=row.is_templated, limit=limit) for row in rows]
