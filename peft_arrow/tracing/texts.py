"""The texts of a run: from the command line, a file, or rows with their tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..prompts import instruction_prompt


COLUMNS = ("prompt", "messages", "instruction", "text")


@dataclass(frozen=True)
class Text:
    """What the model is given.

    Args:
        content (`str` or `list[dict]`): a text, or a chat, which goes through the tokenizer's template.
        task (`str`, *optional*): its task.
        source (`str`): where it is from, for messages.
    """

    content: str | list[dict[str, Any]]
    task: str | None = None
    source: str = "text"

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> Mapping[str, Any]:
        """`input_ids` and `attention_mask` (1, S) as the tokenizer makes them.

        Raises:
            ValueError: no tokens, or a chat and no template.
        """
        if isinstance(self.content, str):
            batch = tokenizer(self.content, return_tensors="pt")
        elif not tokenizer.chat_template:
            raise ValueError(f"{self.source} is a chat, and the tokenizer of the base has no chat template.")
        else:
            asks = self.content[-1]["role"] != "assistant"
            batch = tokenizer.apply_chat_template(
                self.content, add_generation_prompt=asks, return_tensors="pt", return_dict=True
            )
        if batch["input_ids"].numel() == 0:
            raise ValueError(f"{self.source} is empty; a text has at least one token.")
        return {name: batch[name] for name in ("input_ids", "attention_mask")}


def read_texts(texts: Sequence[str] | None = None, file: str | None = None, prompts: str | None = None) -> list[Text]:
    """The texts of one of the three sources.

    Args:
        texts (`Sequence[str]`, *optional*): texts as they are.
        file (`str`, *optional*): a file with one text.
        prompts (`str`, *optional*):
            a file with a JSON object a line: `prompt`, `messages`, `instruction` (with or without `input`) or `text`,
            and `task` where it is known. Completions and outputs are left out.

    Raises:
        ValueError: none or several sources, or a file or line that holds no text.
        OSError: a file cannot be read.
    """
    given = [name for name, value in (("text", texts), ("file", file), ("prompts", prompts)) if value]
    if len(given) != 1:
        raise ValueError(f"{' and '.join(given) or 'no texts'} given; give one of text, file and prompts.")
    if texts:
        return [Text(text, None, f"text {number}") for number, text in enumerate(texts, 1)]
    if file:
        return [Text(_read(file), None, f"file {file!r}")]
    return [_row(row, source) for row, source in _rows(prompts)]


def read_fit_data(files: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Expert -> rows, of files `<expert>.jsonl`.

    Raises:
        ValueError: a file without rows, or a line that is no JSON.
        OSError: a file cannot be read.
    """
    return {Path(file).stem: [row for row, _ in _rows(file)] for file in files}


def _rows(path: str) -> list[tuple[Any, str]]:
    """The JSON of each line, and where it is from."""
    rows = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        source = f"line {number} of {path!r}"
        if line.strip():
            try:
                rows.append((json.loads(line), source))
            except json.JSONDecodeError as error:
                raise ValueError(f"{source} is no JSON: {error}") from error
    if not rows:
        raise ValueError(f"{path!r} has no rows.")
    return rows


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path!r} is no UTF-8 text: {error}") from error


def _row(row: Any, source: str) -> Text:
    column = next((name for name in COLUMNS if isinstance(row, dict) and name in row), None)
    if column is None:
        raise ValueError(f"{source} has none of the keys {', '.join(COLUMNS)}.")
    content, task = row[column], row.get("task")
    if column == "instruction" and isinstance(content, str):  # in the form in which experts are trained on it
        content = instruction_prompt(content, row.get("input"))
    is_chat = isinstance(content, list) and bool(content) and all(map(_is_message, content))
    if not (is_chat or (isinstance(content, str) and column != "messages")):
        wanted = "a chat: objects with role and content" if column == "messages" else "a text or a chat"
        raise ValueError(f"{source}: {column!r} is {str(content)[:60]!r}; it must be {wanted}.")
    if task is not None and (not isinstance(task, str) or not task):
        raise ValueError(f"{source}: 'task' is {task!r}; it must be a name.")
    return Text(content, task, source)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and {"role", "content"} <= set(message)
