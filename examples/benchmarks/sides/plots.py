"""Curves over the number of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def plot_curves(panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], x: str, path: Path) -> None:
    """Draw one panel beside the other, both axes logarithmic.

    Args:
        panels (`Mapping`): label of the y axis -> name of the curve -> points (x, y).
        x (`str`): label of the x axis.
        path (`Path`): the picture.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install 'peft-arrow[viz]'") from error
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, (label, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        ticks = sorted({place for points in curves.values() for place, _ in points})
        for name, points in curves.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axes.set(xlabel=x, ylabel=label, xscale="log", yscale="log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
