"""The pictures of docs/replication.md, drawn from the results file alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from .tables import NAMES  # noqa: E402


COLOURS = {"private": "#1f77b4", "mbc": "#d95f02", "random": "#7570b3", "random_examples": "#1b9e77"}
GREY = "#555555"


def losses(results: dict) -> Any:
    """Loss on training tasks and on held-out ones, by method, with intervals."""
    shown = {name: told for name, told in results["methods"].items() if name in NAMES and "upstream" in told}
    if not shown:
        return None
    names = [name for name in NAMES if name in shown]
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.36 * len(names) + 1.4), sharey=True)
    for axis, suite, title in zip(axes, ("upstream", "sni"), ("training tasks", "held-out tasks")):
        for place, name in enumerate(names):
            told = shown[name].get(suite)
            if told:
                colour = COLOURS.get(name.partition("/")[0], GREY)
                axis.plot([told["low"], told["high"]], [place, place], color=colour, linewidth=2)
                axis.plot(told["mean"], place, "o", color=colour)
        axis.set_title(title)
        axis.set_xlabel("loss, nats a token (95 % interval)")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), [NAMES[name] for name in names])
    axes[0].invert_yaxis()
    return figure


def layers(results: dict) -> Any:
    """Agreement with the own expert, and entropy, layer by layer."""
    if not results["routing"]:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    for library, routers in results["routing"].items():
        for router, told in routers.items():
            style = "-" if router == "arrow" else "--"
            colour = COLOURS.get(library.rpartition("-")[0], GREY)
            rates = [100 * one["top"] for one in told["layer"].values()]
            left.plot(rates, style, color=colour, label=f"{library}, {router}")
            right.plot([one["nats"] for one in told["entropy"].values()], style, color=colour)
        chance = next(iter(routers.values()))["all"]["all"]["chance"]
        left.axhline(100 * chance, color=COLOURS.get(library.rpartition("-")[0], GREY), linewidth=0.8, alpha=0.5)
    left.set_ylabel("own expert first, % (thin: chance)")
    right.set_ylabel("entropy of a token's weights, nats")
    for axis in (left, right):
        axis.set_xlabel("layer")
        axis.grid(alpha=0.3)
    left.legend(fontsize=7)
    return figure


def transfer(results: dict) -> Any:
    """Similarity of two tasks' adapters against what joint training gains."""
    told = results["transfer"]
    if not told:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, key, title in zip(axes, ("delta", "factors"), ("updates", "numbers of A and B")):
        axis.scatter([point[key] for point in told["points"]], [point["gain"] for point in told["points"]])
        axis.set_title(f"r = {told[key]['mean']:.2f} [{told[key]['low']:.2f}, {told[key]['high']:.2f}]")
        axis.set_xlabel(f"cosine of the {title}")
        axis.axhline(0, color=GREY, linewidth=0.8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("private loss less joint loss")
    return figure


def supervised(results: dict) -> Any:
    """Loss after adaptation with 10 % of the data, by start."""
    from .tables import WAYS

    shown = [(way, told["0.1"]) for way in WAYS if (told := results["supervised"].get(way)) and "0.1" in told]
    if not shown:
        return None
    figure, axis = plt.subplots(figsize=(7, 0.36 * len(shown) + 1.4))
    for place, (_, told) in enumerate(shown):
        axis.plot([told["low"], told["high"]], [place, place], color=GREY, linewidth=2)
        axis.plot(told["mean"], place, "o", color=GREY)
    axis.set_yticks(range(len(shown)), [WAYS[way] for way, _ in shown])
    axis.invert_yaxis()
    axis.set_xlabel("loss on 12 held-out tasks after 10 % of their data")
    axis.grid(axis="x", alpha=0.3)
    return figure


FIGURES: dict[str, Callable[[dict], Any]] = {
    "losses": losses,
    "layers": layers,
    "transfer": transfer,
    "supervised": supervised,
}


def draw(results: dict, folder: Path, prefix: str = "") -> list[Path]:
    """Draw what there are results for; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for name, function in FIGURES.items():
        figure = function(results)
        if figure is not None:
            path = folder / f"{prefix}{name}.png"
            figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
            found.append(path)
    return found
