"""One method on one task: the values of its rows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .batches import Around, nothing_around
from .encoding import TooLong, encode, encode_prompt
from .generating import generate_answers
from .measures import choice_values
from .metrics import Scorer, score_answer
from .options import JudgeOptions
from .rows import Row
from .scoring import OptionScore, score_encoded
from .shares import layer_shares
from .tasks import JudgedTask


class RowReader:
    """Reads rows with a model: losses, choices, answers.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of the base.
        limit (`int`, *optional*): the model's context.
        reading (`JudgeOptions`): how.
        scorers (`Mapping`): of generated answers.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        limit: int | None,
        reading: JudgeOptions,
        scorers: Mapping[str, Scorer],
    ) -> None:
        self.tokenizer, self.limit, self.reading, self.scorers = tokenizer, limit, reading, scorers

    def check(self, task: JudgedTask) -> None:
        """Encode all rows of a task once, before anything is judged.

        Raises:
            TooLong: a row does not fit; the message names task and row.
        """
        for told, rows in (("row", task.rows), ("selection row", task.selection)):
            for place, row in enumerate(rows):
                try:
                    self._encoded(row)
                    if task.kind == "generation" and self.reading.generate:
                        self._prompt(row)
                except TooLong as error:
                    raise TooLong(
                        f"task {task.name!r}, {told} {place} {error}; truncate=True cuts prompts on the left."
                    ) from error

    def losses(self, model: torch.nn.Module, rows: Sequence[Row], around: Around = nothing_around) -> list[float]:
        """Nats per token of each row's right answer, the end token included."""
        pairs = [self._pair(row, row.completion) for row in rows]
        return [score.mean_nll for score in self._scored(model, pairs, around)]

    def judge(self, model: torch.nn.Module, task: JudgedTask, around: Around, is_routed: bool) -> dict[str, Any]:
        """All measures of a task's rows.

        Args:
            model (`torch.nn.Module`): the model, set up for the method.
            task (`JudgedTask`): the task.
            around (`Callable`): what is open while a batch is read.
            is_routed (`bool`): whether to count where tokens went.

        Returns:
            `dict`: `values` (measure -> one a row, None where a metric failed), `answers`, `failed` (metric and why),
            `cut` (rows whose prompt was cut), `shares` (of the experts by layer; None if not routed), `seconds`.
        """
        start = time.monotonic()
        split = min(self.reading.traced_rows, len(task.rows)) if is_routed else 0
        shares, scores = None, []
        if split:
            with model.trace_routing() as trace:
                scores = self._row_scores(model, task.rows[:split], around)
            shares = layer_shares(trace)
        scores += self._row_scores(model, task.rows[split:], around)
        values: dict[str, list] = {}
        answers, failed = None, {}
        if task.kind == "choice":
            found = [choice_values(row, options) for row, options in zip(task.rows, scores, strict=True)]
        else:
            found = [{"loss": options[0].mean_nll} for options in scores]
            if self.reading.generate:
                answers = self._answers(model, task, around)
                failed = self._score_answers(task, answers, found)
        for key in dict.fromkeys(key for row in found for key in row):
            values[key] = [row.get(key) for row in found]
        cut = sum(any(option.cut for option in options) for options in scores)
        seconds = round(time.monotonic() - start, 2)
        return {
            "values": values,
            "answers": answers,
            "failed": failed,
            "cut": cut,
            "shares": shares,
            "seconds": seconds,
        }

    def _row_scores(self, model: torch.nn.Module, rows: Sequence[Row], around: Around) -> list[list[OptionScore]]:
        encoded = [self._encoded(row) for row in rows]
        scores = iter(self._scored(model, [pair for pairs in encoded for pair in pairs], around))
        return [[next(scores) for _ in pairs] for pairs in encoded]

    def _scored(self, model: torch.nn.Module, pairs: Sequence[Any], around: Around) -> list[OptionScore]:
        return score_encoded(model, pairs, self.reading.batch_size, self.reading.token_budget, around)

    def _answers(self, model: torch.nn.Module, task: JudgedTask, around: Around) -> list[str]:
        return generate_answers(
            model,
            self.tokenizer,
            [self._prompt(row) for row in task.rows],
            max_new_tokens=self.reading.max_new_tokens,
            until=task.until,
            batch_size=self.reading.batch_size,
            token_budget=self.reading.token_budget,
            around=around,
        )

    def _score_answers(self, task: JudgedTask, answers: Sequence[str], found: list[dict]) -> dict[str, list]:
        """Add the metrics' values to each row's; returns metric -> [rows that failed, why the first did]."""
        failed: dict[str, list] = {}
        for place, (row, answer) in enumerate(zip(task.rows, answers, strict=True)):
            values, reasons = score_answer(self.scorers, answer, row.references)
            found[place] |= values
            for name, reason in reasons.items():
                failed.setdefault(name, [0, f"row {place}: {reason}"])[0] += 1
        return failed

    def _pair(self, row: Row, continuation: str) -> Any:
        return encode(
            self.tokenizer,
            row.prompt,
            continuation,
            is_templated=row.is_templated,
            limit=self.limit,
            truncate=self.reading.truncate,
        )

    def _encoded(self, row: Row) -> list[Any]:
        return [self._pair(row, continuation) for continuation in row.continuations()]

    def _prompt(self, row: Row) -> list[int]:
        room = None if self.limit is None else self.limit - self.reading.max_new_tokens
        return encode_prompt(
            self.tokenizer, row.prompt, is_templated=row.is_templated, room=room, truncate=self.reading.truncate
        )[0]
