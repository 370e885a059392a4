"""A report drawn: the methods with their intervals, and tasks by methods."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

from ..tuner.trace_pictures import new_figure
from .measures import MEASURES, measure_of
from .statistics import task_mean


if TYPE_CHECKING:
    from .report import EvaluationReport


def draw(report: EvaluationReport, path: str | PathLike) -> None:
    """Draw dots with intervals against the base for each measure, and under them the losses of tasks by methods.

    Args:
        report (`EvaluationReport`): with at least one measure.
        path (`str` or `PathLike`): a .png, .pdf or .svg file.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    measures, methods, tasks = report.measures, list(report.methods), list(report.data["tasks"])
    height = 1.2 + 0.28 * len(methods)
    below = 1.8 + 0.3 * len(tasks)
    figure = new_figure(max(3.2 * len(measures) + 2, 0.75 * len(methods) + 4), height + below)
    upper, lower = figure.subfigures(2, 1, height_ratios=[height, below])
    axes = upper.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for place, (key, one) in enumerate(zip(measures, axes, strict=True)):
        _dots(report, key, one, methods)
        if place == 0:
            one.set_yticks(range(len(methods)), methods)
            one.invert_yaxis()
    upper.suptitle("Mean over tasks; the bar is the 95 % interval of the difference to the base")
    _heat(report, lower, methods, tasks)
    figure.savefig(path, dpi=130)


def _dots(report: EvaluationReport, key: str, axes: Any, methods: list[str]) -> None:
    """One dot a method, with the interval of its difference to the base laid around it; the base is a line."""
    measure = measure_of(key)
    scale = 100 if measure.kind == "share" else 1
    for place, name in enumerate(methods):
        mean = report.mean(name, key)
        if mean is None:
            continue
        other = report.reference(name, "base")
        gap = report.difference(name, other, key) if other else None
        if gap is not None:
            ends = [scale * (mean - gap.mean + end) for end in (gap.low, gap.high)]
            axes.plot(ends, [place, place], color="tab:blue" if gap.is_clear else "tab:gray", linewidth=2)
        colour = "tab:blue" if gap is None or gap.is_clear else "tab:gray"
        axes.plot([scale * mean], [place], "o", color=colour, markersize=5)
    if "base" in methods and report.mean("base", key) is not None:
        axes.axvline(scale * report.mean("base", key), color="black", linewidth=0.8, linestyle=":")
    better = "lower" if measure.is_loss else "higher"
    unit = " (%)" if measure.kind == "share" else ""
    axes.set_title(f"{key}{unit}\n{better} is better", fontsize=9)
    axes.grid(axis="y", linewidth=0.3)


def _heat(report: EvaluationReport, figure: Any, methods: list[str], tasks: list[str]) -> None:
    """Tasks down, methods across: the first measure; colours by how much better or worse than the base."""
    key = report.measures[0]
    sign = -1 if MEASURES[key].is_loss else 1
    values = {name: report.methods[name].values(key) for name in methods}
    cells = [[task_mean(values[name][task]) if task in values[name] else None for name in methods] for task in tasks]
    first = methods.index("base") if "base" in methods else 0
    shown = [[0.0 if cell is None else sign * (cell - line[first]) for cell in line] for line in cells]
    most = max((abs(cell) for line in shown for cell in line), default=0) or 1.0
    axes = figure.subplots()
    image = axes.imshow(shown, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    for y, line in enumerate(cells):
        for x, cell in enumerate(line):
            dark = abs(shown[y][x]) > 0.6 * most
            text = "" if cell is None else f"{cell:.2f}"
            axes.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_xticks(range(len(methods)), methods, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_title(f"{key} of each task; blue is better than {methods[first]}, red is worse", fontsize=9)
    figure.colorbar(image, ax=axes)
