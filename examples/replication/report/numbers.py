"""Means and intervals: rows within tasks, and tasks, are drawn again; pairs of methods on the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


DRAWS = 2000
LEVEL = 0.95
Values = Mapping[str, Sequence[float]]


def estimate(values: Values) -> dict[str, float]:
    """The mean over tasks of the tasks' means, with a two-level bootstrap interval.

    Tasks are drawn with replacement, then rows within each drawn task (Davison and Hinkley, Bootstrap Methods and
    their Application, 1997, section 3.8), so that the interval is about other tasks and other rows.

    Returns:
        `dict`: `mean`, `low`, `high` (95 %), `tasks`, `items`.
    """
    tasks = [np.asarray(rows, dtype=float) for rows in values.values() if len(rows)]
    rng = np.random.default_rng(0)
    means = np.empty((len(tasks), DRAWS))
    for place, rows in enumerate(tasks):
        means[place] = rows[rng.integers(0, len(rows), (DRAWS, len(rows)))].mean(axis=1)
    draws = means[rng.integers(0, len(tasks), (DRAWS, len(tasks))), np.arange(DRAWS)[:, None]].mean(axis=1)
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    told = {"mean": np.mean([rows.mean() for rows in tasks]), "low": low, "high": high}
    return {key: round(float(value), 4) for key, value in told.items()} | {
        "tasks": len(tasks),
        "items": sum(map(len, tasks)),
    }


def gaps(ours: Values, other: Values) -> dict[str, list[float]]:
    """Row by row `ours` minus `other`; where one was judged in more rounds, of the first rounds, whose rows agree."""
    return {task: [a - b for a, b in zip(ours[task], other[task])] for task in ours if task in other}


def mean_of(runs: Sequence[Values]) -> dict[str, list[float]]:
    """Each row's mean over the runs; rows that a run lacks are left out."""
    shared = [task for task in runs[0] if all(task in run for run in runs)]
    return {task: [float(np.mean(row)) for row in zip(*(run[task] for run in runs))] for task in shared}


def correlation(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Pearson's r with a bootstrap interval over pairs."""
    points, rng = np.array([x, y]), np.random.default_rng(0)
    draws = []
    for _ in range(DRAWS):
        part = points[:, rng.integers(0, points.shape[1], points.shape[1])]
        if part.std(axis=1).min() > 0:
            draws.append(np.corrcoef(part)[0, 1])
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    told = {"mean": np.corrcoef(points)[0, 1], "low": low, "high": high}
    return {key: round(float(value), 3) for key, value in told.items()} | {"pairs": len(x)}
