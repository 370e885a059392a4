"""The pictures of docs/replication.md, drawn from the results files alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from .analyses import first_with  # noqa: E402
from .tables import NAMES, WAYS, Seeds, method  # noqa: E402


COLOURS = {
    "private": "#1f77b4",
    "mbc": "#d95f02",
    "random": "#7570b3",
    "random_examples": "#1b9e77",
    "embedding": "#a6761d",
    "poly": "#e7298a",
}
GREY = "#555555"
MARKERS = "osD^v"  # of the seeds, in turn


def losses(seeds: Seeds) -> Any:
    """Loss on training tasks and on held-out ones, by method, with intervals."""
    names = [name for name in NAMES if any("upstream" in one["methods"].get(name, {}) for one in seeds.values())]
    if not names:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.36 * len(names) + 1.4), sharey=True)
    for axis, suite, title in zip(axes, ("upstream", "sni"), ("training tasks", "held-out tasks")):
        colours = [COLOURS.get(name.partition("/")[0], GREY) for name in names]
        _by_seed(axis, seeds, [partial(method, name=name, suite=suite) for name in names], colours)
        axis.set_title(title)
        axis.set_xlabel("loss, nats a token (95 % interval)")
    axes[0].set_yticks(range(len(names)), [NAMES[name] for name in names])
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8)
    return figure


def _by_seed(axis: Any, seeds: Seeds, rows: list[Callable[[Any], dict | None]], colours: list[str]) -> None:
    """A row for each of `rows`, which take a seed's results; in it a point with its interval for each seed."""
    for number, (seed, results) in enumerate(seeds.items()):
        shift = 0.26 * (number - (len(seeds) - 1) / 2)
        marker = MARKERS[number % len(MARKERS)]
        for place, (row, colour) in enumerate(zip(rows, colours)):
            if told := row(results):
                axis.plot([told["low"], told["high"]], [place + shift] * 2, color=colour, linewidth=1.5)
                axis.plot(told["mean"], place + shift, marker, color=colour, markersize=5)
        axis.plot([], [], marker, color=GREY, label=f"seed {seed}")
    axis.grid(axis="x", alpha=0.3)


def layers(seeds: Seeds) -> Any:
    """Agreement with the own expert, and entropy, layer by layer, with the first seed that was traced."""
    results = first_with(seeds, "routing")
    if results is None:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    for library, routers in results["routing"].items():
        colour = COLOURS.get(library.rpartition("-")[0], GREY)
        for router, told in routers.items():
            style = "-" if router == "arrow" else "--"
            rates = [100 * one["top"] for one in told["layer"].values()]
            left.plot(rates, style, color=colour, label=f"{library}, {router}")
            right.plot([one["nats"] for one in told["entropy"].values()], style, color=colour)
        chance = next(iter(routers.values()))["all"]["all"]["chance"]
        left.axhline(100 * chance, color=colour, linewidth=0.8, alpha=0.5)
    left.set_ylabel("own expert first, % (thin: chance)")
    right.set_ylabel("entropy of a token's weights, nats")
    for axis in (left, right):
        axis.set_xlabel("layer")
        axis.grid(alpha=0.3)
    left.legend(fontsize=7)
    return figure


def transfer(seeds: Seeds) -> Any:
    """Similarity of two tasks' adapters against what joint training gains, with the first seed that has it."""
    results = first_with(seeds, "transfer")
    if results is None:
        return None
    told = results["transfer"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, key, title in zip(axes, ("delta", "factors"), ("updates", "numbers of A and B")):
        axis.scatter([point[key] for point in told["points"]], [point["gain"] for point in told["points"]])
        axis.set_title(f"r = {told[key]['mean']:.2f} [{told[key]['low']:.2f}, {told[key]['high']:.2f}]")
        axis.set_xlabel(f"cosine of the {title}")
        axis.axhline(0, color=GREY, linewidth=0.8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("private loss less joint loss")
    return figure


def supervised(seeds: Seeds) -> Any:
    """Loss after adaptation with 10 % and with all of the data, by start."""
    told = [results["supervised"] for results in seeds.values()]
    ways = [way for way in WAYS if any("0.1" in one.get(way, {}) for one in told)]
    titles = {"0.1": "10 % of their data", "1.0": "all of their data"}
    shares = [share for share in titles if any(share in one.get(way, {}) for one in told for way in ways)]
    if not shares:
        return None
    size = (3.5 + 3.5 * len(shares), 0.36 * len(ways) + 1.4)
    figure, axes = plt.subplots(1, len(shares), figsize=size, sharey=True, squeeze=False)
    for axis, share in zip(axes[0], shares):
        rows = [lambda one, way=way, share=share: one["supervised"].get(way, {}).get(share) for way in ways]
        _by_seed(axis, seeds, rows, [GREY] * len(ways))
        axis.set_xlabel(f"loss on 12 held-out tasks\nafter {titles[share]}")
    axes[0][0].set_yticks(range(len(ways)), [WAYS[way] for way in ways])
    axes[0][0].invert_yaxis()
    axes[0][0].legend(fontsize=8)
    return figure


FIGURES: dict[str, Callable[[Seeds], Any]] = {
    "losses": losses,
    "layers": layers,
    "transfer": transfer,
    "supervised": supervised,
}


def draw(seeds: Seeds, folder: Path, prefix: str = "") -> list[Path]:
    """Draw what there are results for; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for name, function in FIGURES.items():
        figure = function(seeds)
        if figure is not None:
            path = folder / f"{prefix}{name}.png"
            figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
            found.append(path)
    return found
