"""Differences of methods on the same rows: paired bootstrap intervals, and the spread over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


DRAWS = 2000
LEVEL = 0.95
CHUNK = 1 << 21
Values = Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class Difference:
    """A mean over tasks of the differences of rows, with its bootstrap interval.

    Args:
        mean (`float`): every task with the same weight.
        low, high (`float`): ends of the interval.
        rows (`int`): how many rows were compared.
    """

    mean: float
    low: float
    high: float
    rows: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out; one that is 0 and nothing else does not."""
        return self.low > 0 or self.high < 0


def paired_difference(
    ours: Values, other: Values, *, draws: int = DRAWS, seed: int = 0, level: float = LEVEL
) -> Difference:
    """Mean over tasks of the rows of `ours` minus those of `other`, with a percentile bootstrap over rows.

    Rows are drawn with replacement within each task (stratified), the same rows for both (paired): Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13. Rows that are None in one of them are left
    out of both.

    Args:
        ours, other (`Mapping[str, Sequence]`): task -> one value a row; tasks that only one has are left out.
        draws (`int`): resamples.
        seed (`int`): of the resampling.
        level (`float`): of the interval.

    Raises:
        ValueError: a task with different numbers of rows, or nothing to compare.
    """
    gaps = [gap for gap in (_gaps(task, ours[task], other[task]) for task in ours if task in other) if len(gap)]
    if not gaps:
        raise ValueError(f"there is no row to compare: the tasks are {list(ours)} and {list(other)}.")
    rng = np.random.default_rng(seed)
    means = np.mean([_resampled_means(gap, draws, rng) for gap in gaps], axis=0)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    center = float(np.mean([gap.mean() for gap in gaps]))
    return Difference(center, float(low), float(high), sum(map(len, gaps)))


def _gaps(task: str, ours: Sequence[float | None], other: Sequence[float | None]) -> np.ndarray:
    if len(ours) != len(other):
        raise ValueError(f"task {task!r} has {len(ours)} rows and {len(other)} rows; a pair needs the same rows.")
    return np.array([a - b for a, b in zip(ours, other) if a is not None and b is not None], dtype=np.float64)


def _resampled_means(gap: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Means of `draws` resamples of the rows, (draws,), a few at a time where there are many rows."""
    step = max(CHUNK // len(gap), 1)
    sizes = [min(step, draws - start) for start in range(0, draws, step)]
    return np.concatenate([gap[rng.integers(0, len(gap), (size, len(gap)))].mean(axis=1) for size in sizes])


def mean_over_tasks(values: Values) -> float | None:
    """The mean of each task's rows, averaged over tasks; rows that are None are left out; None without any row."""
    means = [task_mean(rows) for rows in values.values()]
    known = [mean for mean in means if mean is not None]
    return statistics.fmean(known) if known else None


def task_mean(rows: Sequence[float | None]) -> float | None:
    """The mean of the rows that have a value; None where none has."""
    known = [value for value in rows if value is not None]
    return statistics.fmean(known) if known else None


def spread_over_seeds(runs: Sequence[Values]) -> float | None:
    """Standard deviation over the runs of the mean over tasks; None for fewer than two runs."""
    means = [mean_over_tasks(run) for run in runs]
    return statistics.stdev(means) if len(means) > 1 and None not in means else None


def mean_of_runs(runs: Sequence[Values]) -> dict[str, list[float | None]]:
    """Each row's mean over the runs; None where a run has none."""
    return {
        task: [
            None if None in row else statistics.fmean(row) for row in zip(*(run[task] for run in runs), strict=True)
        ]
        for task in runs[0]
    }
