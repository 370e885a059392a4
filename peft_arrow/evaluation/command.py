"""`evaluate_library` on files, as the command line has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..library.library import AdapterLibrary
from .judge import evaluate_library
from .report import EvaluationReport
from .tasks import TRAIN, Task, list_tasks, raw_rows


def evaluate_files(
    libraries: Sequence[str],
    tasks: Sequence[str],
    *,
    base: str | None = None,
    fit_files: Sequence[str] | None = None,
    oracle: Mapping[str, str] | None = None,
    **options: Any,
) -> EvaluationReport:
    """Judge libraries that lie in folders or on the Hub.

    Args:
        libraries (`Sequence[str]`): references; several get the last parts of them as names.
        tasks (`Sequence[str]`): .jsonl files and folders of them.
        base (`str`, *optional*): the base model; by default the one that the libraries name.
        fit_files (`Sequence[str]`, *optional*): `<expert>.jsonl`; by default the rows of the split `train` of the task
            that an expert is the own one of, where every expert has such rows.
        oracle (`Mapping[str, str]`, *optional*): task -> its own expert.
        options: as for `evaluate_library`.

    Raises:
        ValueError: the libraries name different bases, or two of them have one name.
    """
    read = {_name(reference): AdapterLibrary.from_pretrained(reference) for reference in libraries}
    if len(read) < len(libraries):
        raise ValueError(f"libraries {list(libraries)} have the last part of their names in common; rename a folder.")
    bases = {library.base_model_name_or_path for library in read.values()}
    if base is None and len(bases) > 1:
        raise ValueError(f"the libraries name different base models, {sorted(map(str, bases))}; give one with --base.")
    given = list_tasks(list(tasks))
    if fit_files is not None:
        rows = {task.name: raw_rows(task.name, task.rows) for task in list_tasks(list(fit_files))}
        fit_data = dict.fromkeys(read, rows)
    else:
        fit_data = {name: _train_rows(given, library, oracle or {}) for name, library in read.items()}
    is_one = len(read) == 1
    return evaluate_library(
        base or next(iter(bases)),
        next(iter(read.values())) if is_one else read,
        given,
        fit_data=next(iter(fit_data.values())) if is_one else fit_data,
        oracle=oracle,
        **options,
    )


def _name(reference: str) -> str:
    return reference.rstrip("/").rpartition("/")[2].partition("@")[0] or reference


def _train_rows(
    tasks: Sequence[Task], experts: Iterable[str], oracle: Mapping[str, str]
) -> dict[str, list[Mapping[str, Any]]] | None:
    """Expert -> rows for training of the tasks that it is the own expert of; None unless every expert has some."""
    found: dict[str, list] = {expert: [] for expert in experts}
    for task in tasks:
        expert = oracle.get(task.name, task.name)
        if expert in found:
            found[expert] += [row for row in raw_rows(task.name, task.rows) if row.get("split") == TRAIN]
    return found if all(found.values()) else None
