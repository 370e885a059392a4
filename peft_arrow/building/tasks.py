"""What a library is built from: a folder with one file a task, a list of data sets, or a dict of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path

from ..library.adapter import check_name, slug, unique_name
from ..training.data import Examples, kind_of, read_examples
from ..training.reading import BUILDERS, SAVED_MARKS, DatasetLike


TasksLike = Mapping[str, DatasetLike] | str | PathLike | Iterable[str | PathLike]


def read_tasks(datasets: TasksLike) -> dict[str, Examples]:
    """Read and check the rows of every task.

    Args:
        datasets:
            task name -> rows, in any form of `read_examples`; a folder in which every .jsonl file (or .json, .csv,
            .parquet) is a task named by its stem, hidden ones left out; or a list of files, folders and Hub ids, named
            by their last part.

    Raises:
        ValueError: no tasks, a name that is not allowed, bad rows, or tasks of different kinds of rows.
    """
    named = sources_of(datasets)
    if not named:
        raise ValueError("datasets is empty; at least one task is needed.")
    parts = {check_name(task): read_examples(task, source) for task, source in named.items()}
    kinds: dict[str, str] = {}
    for task, part in parts.items():
        kinds.setdefault(kind_of(part.dataset), task)
    if len(kinds) > 1:
        told = " and ".join(f"{task!r} ({kind})" for kind, task in kinds.items())
        raise ValueError(f"datasets are of different kinds: {told}; the experts of a library are trained on one kind.")
    return parts


def sources_of(datasets: TasksLike) -> dict[str, DatasetLike]:
    """Name every task, without reading its rows.

    Raises:
        ValueError: a folder without data files.
    """
    if isinstance(datasets, Mapping):
        return dict(datasets)
    if isinstance(datasets, (str, PathLike)):
        path = Path(datasets).expanduser()
        if not path.is_dir():
            return {slug(path.stem if path.suffix in BUILDERS else path.name): datasets}
        if any((path / mark).is_file() for mark in SAVED_MARKS):
            return {slug(path.name): datasets}
        files = sorted(file for file in path.iterdir() if file.suffix in BUILDERS and not file.name.startswith("."))
        if not files:
            raise ValueError(f"folder {str(path)!r} holds no data file of a task; allowed are {list(BUILDERS)}.")
        datasets = files
    named: dict[str, DatasetLike] = {}
    for source in datasets:
        if not isinstance(source, (str, PathLike)):
            raise ValueError(
                f"datasets holds a {type(source).__name__}; a list is one of files, folders and Hub ids. Rows and "
                "Datasets go in a dict: task name -> rows."
            )
        last = Path(source).name
        stem = Path(source).stem if Path(source).suffix in BUILDERS else last
        named[unique_name(slug(stem), named)] = source
    return named
