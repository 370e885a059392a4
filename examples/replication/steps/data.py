"""The rows: the tasks that libraries are trained on, the ones that are held out, and the benchmarks."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


Row = Mapping[str, Any]
FOLDERS = {"upstream": "train_suite", "sni": "heldout_sni", "benchmarks": "heldout_benchmarks"}
SEED = 0  # of the order in which rows are judged


@dataclass(frozen=True)
class Suites:
    """Rows by task.

    Args:
        train (`dict[str, list]`): training rows of the upstream and of the held-out tasks.
        judged (`dict[str, dict[str, list]]`): suite -> task -> rows to judge, in the order they are judged in.
        category (`dict[str, str]`): of every task.
    """

    train: dict[str, list[Row]]
    judged: dict[str, dict[str, list[Row]]]
    category: dict[str, str]

    @property
    def upstream(self) -> list[str]:
        """The tasks of libraries."""
        return list(self.judged["upstream"])

    def suite_of(self, task: str) -> str:
        """The suite of a task."""
        return next(suite for suite, tasks in self.judged.items() if task in tasks)

    def round(self, number: int, counts: Mapping[str, int]) -> dict[str, list[Row]]:
        """Task -> the rows of a round; rounds share none. A task whose rows are used up is left out."""
        found = {}
        for suite, tasks in self.judged.items():
            for task, rows in tasks.items():
                part = rows[number * counts[suite] : (number + 1) * counts[suite]]
                if part:
                    found[task] = part
        return found


def read_suites(folder: Path, wanted: Mapping[str, Sequence[str] | None] | None = None) -> Suites:
    """Read the three folders; benchmarks without options are left out.

    Args:
        folder (`Path`): with the folders of `FOLDERS`.
        wanted (`Mapping`, *optional*): suite -> tasks, or None for all of it; by default all of every suite.
    """
    train: dict[str, list[Row]] = {}
    judged: dict[str, dict[str, list[Row]]] = {suite: {} for suite in FOLDERS}
    category = {}
    chosen = {suite: (wanted or {}).get(suite) for suite in FOLDERS}
    for suite, name in FOLDERS.items():
        for path in sorted((folder / name).glob("*.jsonl")):
            if chosen[suite] is not None and path.stem not in chosen[suite]:
                continue
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            if suite == "benchmarks":
                rows = [row for row in rows if row["options"]]
            else:
                train[path.stem] = [row for row in rows if row["split"] == "train"]
                rows = [row for row in rows if row["split"] != "train"]
            if rows:
                judged[suite][path.stem] = shuffled(path.stem, rows)
                category[path.stem] = rows[0].get("category", suite)
    missing = [name for suite, name in FOLDERS.items() if not judged[suite] and chosen[suite] != []]
    if missing:
        raise ValueError(f"--data {str(folder)!r} holds no rows in {missing[0]!r}.")
    return Suites(train, judged, category)


def plain(rows: Iterable[Row]) -> list[Row]:
    """Rows without options and notes: what models are trained on."""
    return [{key: row[key] for key in ("instruction", "input", "output")} for row in rows]


def shuffled(task: str, rows: list[Row]) -> list[Row]:
    """In an order of their own: files are often sorted by label."""
    order = list(range(len(rows)))
    random.Random(f"{SEED} {task}").shuffle(order)
    return [{key: value for key, value in rows[place].items() if key != "split"} for place in order]
