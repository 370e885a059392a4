"""One row of a task: what the model is asked, what is right, and between what it chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..prompts import instruction_prompt


ALLOWED = "'prompt', 'messages', 'instruction' (with or without 'input'), or 'input' with 'options' and 'gold'"
ANSWERS = ("completion", "output")


@dataclass(frozen=True)
class Row:
    """A checked row.

    Args:
        prompt (`str`): what the model reads.
        references (`tuple[str, ...]`): right answers; the loss is that of the first.
        options (`tuple[str, ...]`): of a choice row, in order; empty otherwise.
        gold (`int`, *optional*): the right option.
        delimiter (`str`): stands between the prompt and an answer.
        is_templated (`bool`): whether the prompt is a rendered chat, which brings its own special tokens.
    """

    prompt: str
    references: tuple[str, ...]
    options: tuple[str, ...] = ()
    gold: int | None = None
    delimiter: str = ""
    is_templated: bool = False

    @property
    def completion(self) -> str:
        """What follows the prompt when the answer is right: the delimiter and the first right answer."""
        return self.delimiter + self.references[0]

    def continuations(self) -> tuple[str, ...]:
        """What may follow the prompt: each option, or the completion alone."""
        return tuple(self.delimiter + option for option in self.options) or (self.completion,)


def read_row(
    raw: Mapping[str, Any],
    where: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    delimiter: str | None = None,
) -> Row:
    """Read one row of any form.

    Prompt and completion are joined as they are, as TRL joins them in training. Options of a row that states `gold`
    get a space before them where the prompt ends without white space, as in the paper's code (arXiv 2405.11157).

    Args:
        raw (`Mapping`): the row; a column that is None counts as missing.
        where (`str`): task and position, for messages.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): renders chats.
        delimiter (`str`, *optional*): goes between prompt and answer whatever the row is.

    Raises:
        ValueError: no known columns, nothing to compare with, a single option, or no option that is the answer.
    """
    row = {name: value for name, value in raw.items() if value is not None}
    prompt, answer, is_templated = _prompt_and_answer(row, where, tokenizer)
    options = _options(row, where)
    gold = _gold(row, options, answer, where) if options else None
    references = (options[gold],) if options else _references(row, answer, where)
    if delimiter is None:
        is_joined = bool(prompt) and not prompt[-1].isspace()
        delimiter = " " if is_joined and "gold" in row and not _begin_with_space(options or references) else ""
    return Row(prompt, references, options, gold, delimiter, is_templated)


def _begin_with_space(texts: Sequence[str]) -> bool:
    return all(text[:1].isspace() for text in texts)


def _prompt_and_answer(
    row: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[str, str | None, bool]:
    answer = next((row[name] for name in ANSWERS if name in row), None)
    if "messages" in row or isinstance(row.get("prompt"), list):
        messages = list(row.get("messages") or [*row["prompt"], *(answer if isinstance(answer, list) else [])])
        return *_rendered(messages, where, tokenizer), True
    if "prompt" in row:
        prompt = row["prompt"]
    elif "instruction" in row:
        prompt = instruction_prompt(row["instruction"], row.get("input"))
    elif "input" in row:
        prompt = row["input"]
    else:
        raise ValueError(f"{where} has the columns {list(row)}; allowed are {ALLOWED}.")
    for name, value in (("prompt", prompt), ("answer", answer)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{where}: the {name} is {str(value)[:60]!r}; it must be a text.")
    return prompt, answer, False


def _rendered(messages: list, where: str, tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, str | None]:
    """A chat as (text before the last answer, that answer)."""
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError(f"{where} is a chat, and the tokenizer has no chat template.")
    if not messages or not all(isinstance(message, Mapping) and "content" in message for message in messages):
        raise ValueError(f"{where}: messages must be a list of messages with 'role' and 'content'.")
    if messages[-1].get("role") != "assistant":
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), None
    whole, answer = tokenizer.apply_chat_template(messages, tokenize=False), messages[-1]["content"].strip()
    start = whole.rfind(answer)
    if not answer or start < 0:
        raise ValueError(f"{where}: the chat template does not show the last answer, {answer[:60]!r}.")
    return whole[:start], answer


def _options(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    options = row.get("options")
    if options is None:
        return ()
    if isinstance(options, str) or not all(isinstance(option, str) and option for option in options):
        raise ValueError(f"{where}: options={str(options)[:80]!r} must be a list of texts that are not empty.")
    if len(options) < 2:
        raise ValueError(f"{where} has {len(options)} option, {list(options)}; a choice is between at least two.")
    if len(set(options)) < len(options):
        raise ValueError(f"{where}: options={list(options)} holds an option twice.")
    return tuple(options)


def _gold(row: Mapping[str, Any], options: tuple[str, ...], answer: str | None, where: str) -> int:
    if "gold" in row:
        gold = row["gold"]
        if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(options):
            raise ValueError(f"{where}: gold={gold!r} must be a position in the {len(options)} options, from 0.")
        return gold
    stripped = [option.strip() for option in options]
    if answer is None or answer.strip() not in stripped:
        raise ValueError(f"{where}: the answer {answer!r} is none of the options {list(options)}.")
    return stripped.index(answer.strip())


def _references(row: Mapping[str, Any], answer: str | None, where: str) -> tuple[str, ...]:
    given = row.get("references", ())
    if isinstance(given, str) or not all(isinstance(text, str) for text in given):
        raise ValueError(f"{where}: references={str(given)[:80]!r} must be a list of texts.")
    found = tuple(dict.fromkeys(text for text in (answer, *given) if text is not None and text.strip()))
    if not found:
        raise ValueError(f"{where} has no answer to compare with: no completion, output, references or options.")
    return found
