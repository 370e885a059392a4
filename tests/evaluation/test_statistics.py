"""The bootstrap against slow loops of its own, and what a difference is called."""

from __future__ import annotations

import random
import statistics

import pytest

from peft_arrow.evaluation.statistics import (
    mean_of_runs,
    mean_over_tasks,
    paired_difference,
    spread_over_seeds,
    task_mean,
)


def slow_interval(ours, other, draws, seed):
    """Percentile bootstrap of the mean over tasks of mean differences, with loops and another generator."""
    rng = random.Random(seed)
    means = []
    for _ in range(draws):
        of_tasks = []
        for task in ours:
            total = 0.0
            for _ in ours[task]:
                place = rng.randrange(len(ours[task]))
                total += ours[task][place] - other[task][place]
            of_tasks.append(total / len(ours[task]))
        means.append(sum(of_tasks) / len(of_tasks))
    means.sort()
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


def made_up(seed, shift):
    rng = random.Random(seed)
    tasks = {"small": 12, "large": 60}
    other = {task: [rng.gauss(2, 1) for _ in range(count)] for task, count in tasks.items()}
    ours = {task: [value + rng.gauss(shift, 0.5) for value in rows] for task, rows in other.items()}
    return ours, other


@pytest.mark.parametrize(("seed", "shift"), [(0, 0.0), (1, -0.3), (2, 1.0)])
def test_bootstrap_against_a_slow_loop(seed, shift):
    ours, other = made_up(seed, shift)
    found = paired_difference(ours, other, draws=4000)
    low, high = slow_interval(ours, other, 4000, seed=99)
    width = high - low
    assert found.low == pytest.approx(low, abs=0.08 * width) and found.high == pytest.approx(high, abs=0.08 * width)
    exact = statistics.fmean(
        statistics.fmean(a - b for a, b in zip(ours[task], other[task], strict=True)) for task in ours
    )
    assert found.mean == pytest.approx(exact) and found.rows == 72
    assert paired_difference(ours, other, draws=4000) == found != paired_difference(ours, other, draws=4000, seed=1)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    held = 0
    for seed in range(200):
        rng = random.Random(seed)
        gaps = {"t": [rng.gauss(0.5, 1) for _ in range(40)]}
        found = paired_difference(gaps, {"t": [0.0] * 40}, draws=400)
        held += found.low <= 0.5 <= found.high
    assert 0.89 <= held / 200 <= 0.99


def test_pairs_matter():
    """Rows differ a lot and methods by 0.1: only pairs can see it."""
    rng = random.Random(0)
    other = {"t": [rng.gauss(0, 10) for _ in range(30)]}
    ours = {"t": [value - 0.1 for value in other["t"]]}
    found = paired_difference(ours, other)
    assert found.is_clear and found.low == pytest.approx(-0.1) and found.high == pytest.approx(-0.1)
    assert not paired_difference(ours, ours).is_clear


def test_tasks_have_the_same_weight_and_missing_rows_are_left_out():
    ours = {"a": [1.0], "b": [0.0] * 99, "only here": [5.0]}
    other = {"a": [0.0], "b": [0.0] * 99}
    assert paired_difference(ours, other).mean == 0.5
    holes = paired_difference({"a": [1.0, None, 3.0]}, {"a": [0.0, 0.0, None]})
    assert (holes.mean, holes.rows) == (1.0, 1)
    with pytest.raises(ValueError, match="'a' has 2 rows and 1 rows"):
        paired_difference({"a": [1.0, 2.0]}, {"a": [1.0]})
    with pytest.raises(ValueError, match="there is no row to compare"):
        paired_difference({"a": [None]}, {"a": [1.0]})


def test_means_and_spread():
    runs = [{"a": [1.0, 3.0], "b": [0.0]}, {"a": [3.0, 5.0], "b": [2.0]}]
    assert mean_of_runs(runs) == {"a": [2.0, 4.0], "b": [1.0]}
    assert mean_over_tasks(runs[0]) == 1.0 and mean_over_tasks({}) is None and task_mean([None]) is None
    assert spread_over_seeds(runs) == pytest.approx(statistics.stdev([1.0, 3.0]))
    assert spread_over_seeds(runs[:1]) is None
    assert mean_of_runs([{"a": [None, 1.0]}, {"a": [2.0, 3.0]}]) == {"a": [None, 2.0]}
