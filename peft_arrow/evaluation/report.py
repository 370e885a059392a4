"""The result of `evaluate_library`: numbers of every method, row by row, and what can be told of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from ..library.manifest import Evaluation
from . import findings, pictures, tables
from .measures import MEASURES
from .methods import SPECIAL
from .statistics import DRAWS, Difference, mean_of_runs, mean_over_tasks, paired_difference, spread_over_seeds


FORMAT = 1


@dataclass(frozen=True)
class MethodResult:
    """One method of one library.

    Args:
        name (`str`): in tables; of several libraries with the library's name and a slash before it.
        library (`str`): the library's name; "" where there is one only.
        record (`Mapping`): `told`, `kind`, and `runs`: each with `seed` and `tasks`, task -> the results of its rows.
    """

    name: str
    library: str
    record: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """As in `Method`."""
        return self.record["kind"]

    @property
    def runs(self) -> list[Mapping[str, Any]]:
        """One for each seed."""
        return self.record["runs"]

    def values_of_runs(self, measure: str) -> list[dict[str, list]]:
        """For each run: task -> values of the rows, of the tasks that have the measure."""
        return [
            {task: cell["values"][measure] for task, cell in run["tasks"].items() if measure in cell["values"]}
            for run in self.runs
        ]

    def values(self, measure: str) -> dict[str, list]:
        """Task -> values of the rows, the mean over the runs."""
        return mean_of_runs(self.values_of_runs(measure))

    def shares(self) -> dict[str, Mapping]:
        """Task -> shares of the experts by layer, of the first run; empty where nothing was routed."""
        return {task: cell["shares"] for task, cell in self.runs[0]["tasks"].items() if cell["shares"]}


class EvaluationReport:
    """What `evaluate_library` found.

    Args:
        data (`Mapping`): anything JSON knows; `to_json` writes it, `from_json` reads it back.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        self._differences: dict[tuple[str, str, str], Difference | None] = {}

    @cached_property
    def methods(self) -> dict[str, MethodResult]:
        """Name -> result, in the order of the tables; the base once."""
        found: dict[str, MethodResult] = {}
        for label, library in self.data["libraries"].items():
            for name, record in library["methods"].items():
                shown = name if name == "base" or not label else f"{label}/{name}"
                found.setdefault(shown, MethodResult(shown, label, record))
        return found

    @cached_property
    def measures(self) -> list[str]:
        """Keys of the measures that some task has; built-in ones first."""
        present = {
            key: None
            for method in self.methods.values()
            for run in method.runs
            for cell in run["tasks"].values()
            for key in cell["values"]
        }
        return [key for key in MEASURES if key in present] + [key for key in present if key not in MEASURES]

    def mean(self, method: str, measure: str) -> float | None:
        """The mean over tasks, each with the same weight; None where no task has the measure."""
        return mean_over_tasks(self.methods[method].values(measure))

    def spread(self, method: str, measure: str) -> float | None:
        """Standard deviation over the method's seeds of the mean over tasks; None for a single run."""
        return spread_over_seeds(self.methods[method].values_of_runs(measure))

    def reference(self, method: str, kind: str) -> str | None:
        """The name of the method that `method` is compared with: `base`, or the control `kind` of its own library."""
        label = self.methods[method].library
        name = kind if kind == "base" or not label else f"{label}/{kind}"
        return name if name in self.methods and name != method else None

    def difference(self, method: str, other: str, measure: str) -> Difference | None:
        """`method` minus `other`, paired by rows; None where they have no rows in common."""
        key = (method, other, measure)
        if key not in self._differences:
            ours, theirs = self.methods[method].values(measure), self.methods[other].values(measure)
            shared = [
                task
                for task in ours
                if task in theirs and any(None not in pair for pair in zip(ours[task], theirs[task], strict=True))
            ]
            draws = self.data["settings"].get("draws", DRAWS)
            self._differences[key] = paired_difference(ours, theirs, draws=draws) if shared else None
        return self._differences[key]

    def what_to_look_at(self) -> list[str]:
        """Computed sentences on what is suspicious or easily overlooked."""
        return findings.what_to_look_at(self)

    def table(self) -> str:
        """The whole report as plain text."""
        return tables.as_text(self)

    def to_markdown(self) -> str:
        """The whole report as Markdown."""
        return tables.as_markdown(self)

    def to_json(self, path: str | PathLike | None = None) -> str:
        """All numbers as JSON; written to `path` if there is one."""
        text = json.dumps({**self.data, "what_to_look_at": self.what_to_look_at()}, indent=1, ensure_ascii=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, path: str | PathLike) -> EvaluationReport:
        """Read what `to_json` wrote.

        Raises:
            ValueError: it is of another format version.
        """
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data.get("format") != FORMAT:
            raise ValueError(f"{str(path)!r} is of format {data.get('format')!r}; this version reads {FORMAT}.")
        return cls(data)

    def plot(self, path: str | PathLike) -> None:
        """Draw the methods with their intervals, and losses of tasks by methods. Needs matplotlib (extra `viz`)."""
        pictures.draw(self, path)

    def evaluations(self, library: str = "") -> list[Evaluation]:
        """The means over tasks for `library.describe(evaluation=...)`, so that the card shows them.

        Args:
            library (`str`): which, of several.
        """
        found = []
        for name, method in self.methods.items():
            if method.library != library and name != "base":
                continue
            for key in self.measures:
                value = self.mean(name, key)
                if value is not None:
                    tasks = len(method.values(key))
                    dataset = f"mean over {tasks} tasks" if tasks > 1 else next(iter(method.values(key)))
                    told = method.record["told"] if method.kind in SPECIAL else name.rpartition("/")[2]
                    found.append(Evaluation(dataset, key, round(value, 4), split="held-out", method=told))
        return found
