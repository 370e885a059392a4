"""Tasks: named rows, which of them are judged, and which may be used to choose something."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .rows import Row, read_row


KINDS = ("auto", "choice", "generation")
TRAIN = "train"
Rows = Iterable[Mapping[str, Any]] | str | PathLike


@dataclass(frozen=True)
class Task:
    """A task as it is given to `evaluate_library`.

    Args:
        name (`str`): its name.
        rows: the rows, as dicts or a `Dataset`, or a .jsonl file. Where they have a column `split`, the rows of
            `train` are for selection and the others are judged.
        kind (`str`): `"choice"`, `"generation"`, or `"auto"`: choice where the rows have options.
        expert (`str`, *optional*): its own expert, for the oracle; by default the expert of the task's name.
        selection: rows that may choose something (the best single expert); never judged.
        until (`tuple[str, ...]`): a generated answer ends before the first of these texts.
        delimiter (`str`, *optional*): between prompt and answer; by default see [`read_row`].
    """

    name: str
    rows: Rows = field(repr=False)
    kind: str = "auto"
    expert: str | None = None
    selection: Rows | None = field(default=None, repr=False)
    until: tuple[str, ...] = ()
    delimiter: str | None = None


@dataclass(frozen=True)
class JudgedTask:
    """A task that was read and checked.

    Args:
        name, kind, expert, until: as in [`Task`]; `kind` is decided.
        rows (`tuple[Row, ...]`): the judged ones.
        selection (`tuple[Row, ...]`): the ones that may choose something.
        repeated (`int`): judged rows whose prompt and answer are also among the rows for selection or training.
        fingerprint (`str`): of the judged rows and of how they are judged.
    """

    name: str
    kind: str
    expert: str | None
    until: tuple[str, ...]
    rows: tuple[Row, ...] = field(repr=False)
    selection: tuple[Row, ...] = field(repr=False)
    repeated: int
    fingerprint: str


def list_tasks(tasks: Any) -> list[Task]:
    """The tasks of a mapping name -> rows or `Task`, of a list of `Task` and files, or of a file or folder.

    Raises:
        ValueError: no tasks, a file that is missing, or a name twice.
    """
    if isinstance(tasks, Mapping):
        found = [
            replace(value, name=name) if isinstance(value, Task) else Task(name, value)
            for name, value in tasks.items()
        ]
    else:
        several = [tasks] if isinstance(tasks, (str, PathLike, Task)) else list(tasks)
        found = [task for entry in several for task in _tasks_at(entry)]
    names = [task.name for task in found]
    if not found or len(set(names)) < len(names):
        raise ValueError(f"tasks have the names {names}; at least one is needed, and each name once.")
    return found


def _tasks_at(entry: Task | str | PathLike) -> list[Task]:
    if isinstance(entry, Task):
        return [entry]
    if not isinstance(entry, (str, PathLike)):
        raise ValueError(f"tasks holds a {type(entry).__name__}; allowed are a Task and a .jsonl file or folder.")
    path = Path(entry).expanduser()
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"tasks: the folder {str(path)!r} holds no .jsonl file.")
    return [Task(file.stem, file) for file in files]


def read_task(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_rows: int | None = None,
    selection_rows: int = 16,
) -> JudgedTask:
    """Read and check a task.

    Args:
        task (`Task`): the task.
        tokenizer (`PreTrainedTokenizerBase`): renders chats.
        max_rows (`int`, *optional*): judge at most so many rows, taken evenly.
        selection_rows (`int`): use at most so many rows for selection, taken evenly.

    Raises:
        ValueError: a row that cannot be judged, no rows, or rows of both kinds.
    """
    if task.kind not in KINDS:
        raise ValueError(
            f"task {task.name!r}: kind={task.kind!r} is unknown; allowed are {', '.join(map(repr, KINDS))}."
        )
    raw = raw_rows(task.name, task.rows)
    judged = [row for row in raw if row.get("split") != TRAIN]
    training = [row for row in raw if row.get("split") == TRAIN]
    if task.selection is not None:
        training = raw_rows(task.name, task.selection)
    if not judged:
        told = f"{len(training)} rows, all of them of the split 'train'" if training else "no rows"
        raise ValueError(f"task {task.name!r} has {told}; at least one must be left to judge.")
    rows, selection = (
        [
            read_row(row, f"task {task.name!r}, {told} {place}", tokenizer, task.delimiter)
            for place, row in enumerate(part)
        ]
        for told, part in (("row", judged), ("selection row", training))
    )
    kind = _kind(task, rows)
    chosen = tuple(evenly(rows, max_rows))
    known = {(row.prompt.strip(), row.references[0].strip()) for row in selection}
    repeated = sum((row.prompt.strip(), row.references[0].strip()) in known for row in chosen)
    mark = hashlib.sha256(json.dumps([kind, task.until, *map(astuple, chosen)]).encode()).hexdigest()[:16]
    few = tuple(evenly(selection, selection_rows))
    return JudgedTask(task.name, kind, task.expert, tuple(task.until), chosen, few, repeated, mark)


def _kind(task: Task, rows: Sequence[Row]) -> str:
    with_options = sum(bool(row.options) for row in rows)
    if task.kind == "generation":
        return task.kind
    if task.kind == "choice" or with_options:
        if with_options < len(rows):
            place = next(place for place, row in enumerate(rows) if not row.options)
            raise ValueError(f"task {task.name!r}, row {place} has no options, and the task is a choice.")
        return "choice"
    return "generation"


def evenly(rows: Sequence[Any], count: int | None) -> list[Any]:
    """At most `count` rows at even distances, all for None; files are often sorted by label."""
    if count is None or count >= len(rows):
        return list(rows)
    return [rows[place * len(rows) // count] for place in range(count)]


def raw_rows(name: str, source: Rows) -> list[Mapping[str, Any]]:
    """The rows of a task as they are given.

    Args:
        name (`str`): of the task, for messages.
        source: rows, or a .jsonl file.

    Raises:
        ValueError: no such file, or something in it that is no row.
    """
    if isinstance(source, (str, PathLike)):
        return _read_lines(name, Path(source).expanduser())
    rows = list(source)
    if not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"task {name!r} holds other things than rows; a row is a dict of columns.")
    return rows


def _read_lines(name: str, path: Path) -> list[Mapping[str, Any]]:
    if not path.is_file():
        raise ValueError(f"task {name!r}: there is no file {str(path)!r}.")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"task {name!r}: line {number} of {str(path)!r} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"task {name!r}: line {number} of {str(path)!r} is not a row, a JSON object.")
        rows.append(row)
    return rows


def own_experts(
    tasks: Sequence[JudgedTask], experts: Sequence[str], oracle: Mapping[str, str], is_only: bool = True
) -> dict[str, str]:
    """Task -> its own expert: what `oracle` says, or the task, or the expert of the task's name.

    Args:
        tasks (`Sequence[JudgedTask]`): the tasks.
        experts (`Sequence[str]`): the library's.
        oracle (`Mapping[str, str]`): task -> expert.
        is_only (`bool`): whether an expert that is not in the library is an error; with several libraries it is not.

    Raises:
        ValueError: a task or an expert that is not there.
    """
    names = [task.name for task in tasks]
    unknown = [name for name in oracle if name not in names]
    if unknown:
        raise ValueError(f"oracle names the task {unknown[0]!r}, which is not judged; the tasks are {names}.")
    found = {}
    for task in tasks:
        expert = oracle.get(task.name) or task.expert or task.name
        if expert in experts:
            found[task.name] = expert
        elif is_only and expert != task.name:
            raise ValueError(
                f"task {task.name!r}: its own expert {expert!r} is not in the library, which has {list(experts)}."
            )
    return found
