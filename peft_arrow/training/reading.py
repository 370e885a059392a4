"""Where rows are read from: memory, files, folders, the Hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from ..library.reading import READ_ERRORS
from .reaching import unreadable


DatasetLike = Dataset | DatasetDict | str | PathLike | Iterable[Mapping[str, Any]]


# Of these `Dataset.save_to_disk` and that of a `DatasetDict` write one.
SAVED_MARKS = ("state.json", "dataset_dict.json")
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """No bars of the package datasets, which shows one for each small step."""
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


def load_rows(name: str, source: DatasetLike) -> Dataset:
    """The rows of a dataset, wherever they lie.

    Raises:
        ValueError: nothing readable is there; the message says what was tried.
        ConnectionError: the Hub cannot be reached.
    """
    if isinstance(source, DatasetDict):
        if "train" not in source:
            raise ValueError(
                f"dataset {name!r} has the splits {list(source)}; pass one of them, or one named 'train'."
            )
        return source["train"]
    if isinstance(source, Dataset):
        return source
    if isinstance(source, (str, PathLike)):
        return _read(name, source)
    if not isinstance(source, Iterable):
        raise ValueError(
            f"dataset {name!r} is a {type(source).__name__}; allowed are a Dataset, a Hub id, a path and a list of "
            "rows."
        )
    rows = list(source)
    if not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"dataset {name!r} is a list with other things than rows; a row is a dict of columns.")
    return Dataset.from_list([dict(row) for row in rows])


def _read(name: str, source: str | PathLike) -> Dataset:
    path = Path(source).expanduser()
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"dataset {name!r} is empty: {str(path)!r} has no rows.")
    if path.is_file() and path.suffix not in BUILDERS:
        raise ValueError(f"dataset {name!r}: {str(path)!r} is of an unknown format; allowed are {list(BUILDERS)}.")
    is_local = not isinstance(source, str) or source.startswith(("/", "./", "../", "~"))
    if not path.exists() and is_local:
        raise ValueError(f"dataset {name!r}: there is no file or folder {str(path)!r}.")
    try:
        if path.is_file():
            return load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train")
        if any((path / mark).is_file() for mark in SAVED_MARKS):
            return load_rows(name, load_from_disk(str(path)))
        return load_dataset(str(source), split="train")
    except (*READ_ERRORS, DatasetGenerationError) as error:
        tried = "as a folder" if path.exists() else "as a path and as an id on the Hub"
        # Of a broken file older versions of datasets raise something else than DatasetGenerationError.
        is_broken = path.is_file() or isinstance(error, DatasetGenerationError)
        told = "cannot be read" if is_broken else f"was tried {tried}"
        reason = error.__cause__ or error if isinstance(error, DatasetGenerationError) else error
        raise unreadable(f"dataset {name!r}: {str(source)!r}", told, reason) from error
