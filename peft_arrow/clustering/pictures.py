"""Pictures of a clustering: who is like whom, a map, and the tree."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import dendrogram, leaves_list
from sklearn.decomposition import KernelPCA

from .grouping import average_tree


# With more adapters than this their names are left out: they would overlap.
MOST_NAMES = 50
LONGEST_NAME = 32
# Okabe and Ito's colours, which people who see colours differently can tell apart, then more of other lightness.
COLOURS = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C6D00", "#000000", "#7F3C8D", "#80BA5A"),
    *("#A5AA99", "#E73F74", "#11A579", "#3969AC", "#B8860B", "#8B4513", "#4B4B8F", "#66C5CC", "#B3B3B3", "#DCB0F2"),
)
MARKERS = "osD^vP*X"


def draw_all(
    names: Sequence[str], labels: np.ndarray, similarity: np.ndarray, silhouette: float, folder: Path
) -> dict[str, Path]:
    """Draw the three pictures; returns `similarity`, `map`, `dendrogram` -> file. The folder is made.

    Args:
        names (`Sequence[str]`): of the N adapters.
        labels (`np.ndarray`): (N,).
        similarity (`np.ndarray`): (N, N).
        silhouette (`float`): for the titles.
        folder (`Path`): where to write.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    shown = [name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "\u2026" for name in names]
    told = "" if np.isnan(silhouette) else f", silhouette {silhouette:.2f}"
    title = f"{len(names)} adapters, {len(np.unique(labels))} clusters{told}"
    figures = {
        "similarity": similarity_figure(shown, labels, similarity, title),
        "map": map_figure(shown, labels, similarity, title),
    }
    if len(names) > 1:
        figures["dendrogram"] = dendrogram_figure(shown, labels, similarity, title)
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.png" for name in figures}
    for name, figure in figures.items():
        figure.savefig(files[name], dpi=130)
    return files


def similarity_figure(names: Sequence[str], labels: np.ndarray, similarity: np.ndarray, title: str) -> Any:
    """The cosines, ordered by cluster and inside a cluster by the tree; frames show the clusters."""
    order = np.array(sorted(_tree_order(similarity), key=lambda row: labels[row]))
    side = 4.5 + 0.17 * min(len(names), MOST_NAMES)
    figure = _new_figure(side + 1.2, side)
    axes = figure.subplots()
    off = abs(similarity[~np.eye(len(names), dtype=bool)])
    top = max(float(off.max(initial=0)), 1e-3)
    image = axes.imshow(similarity[np.ix_(order, order)], cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(names)], strict=True):
        corner, size = (start - 0.5, start - 0.5), end - start
        colour = _colour(labels[order[start]])
        axes.add_patch(_rectangle(corner, size, colour))
        if len(names) > MOST_NAMES:
            axes.text(
                -0.01 * len(names) - 0.5, start + size / 2 - 0.5, str(labels[order[start]]), ha="right", va="center"
            )
    if len(names) <= MOST_NAMES:
        places, texts = range(len(names)), [names[row] for row in order]
        axes.set_xticks(places, texts, rotation=90, fontsize=7)
        axes.set_yticks(places, texts, fontsize=7)
        for tick, row in zip([*axes.get_xticklabels(), *axes.get_yticklabels()], [*order, *order], strict=True):
            tick.set_color(_colour(labels[row]))
    else:
        axes.set_xticks([])
        axes.set_yticks([])
    axes.set_title(title)
    figure.colorbar(image, ax=axes, shrink=0.8, label="cosine (the diagonal is 1)")
    return figure


def map_figure(names: Sequence[str], labels: np.ndarray, similarity: np.ndarray, title: str) -> Any:
    """The first two principal components of the updates at length 1, from their inner products, the cosines."""
    pca = KernelPCA(2, kernel="precomputed", eigen_solver="dense")
    places = pca.fit_transform(similarity.astype(float)) if len(names) > 2 else np.eye(2)[: len(names)]
    figure = _new_figure(10, max(6.5, 1.2 + 0.15 * min(len(names), MOST_NAMES)))
    axes, margin = figure.subplots(1, 2, width_ratios=(4, 1))
    for label in np.unique(labels):
        members = labels == label
        axes.scatter(*places[members].T, color=_colour(label), marker=MARKERS[label % len(MARKERS)], s=45)
    order = sorted(range(len(names)), key=lambda row: (labels[row], names[row]))
    if len(names) <= MOST_NAMES:
        lines = [(f"{number}  {names[row]}", labels[row]) for number, row in enumerate(order, start=1)]
        for number, row in enumerate(order, start=1):
            axes.annotate(str(number), places[row], (4, 3), textcoords="offset points", fontsize=7)
    else:
        lines = [(f"cluster_{label}", label) for label in np.unique(labels)]
    _list_beside(margin, lines)
    axes.set(title=title, xlabel="first principal component of the updates", ylabel="second", xmargin=0.08)
    return figure


def _list_beside(axes: Any, lines: Sequence[tuple[str, int]]) -> None:
    axes.axis("off")
    step = min(1 / len(lines), 0.04)
    for place, (text, label) in enumerate(lines):
        axes.text(0, 1 - step * (place + 0.5), text, color=_colour(label), fontsize=8, va="center")


def dendrogram_figure(names: Sequence[str], labels: np.ndarray, similarity: np.ndarray, title: str) -> Any:
    """The tree of average linkage on the cosine distance; a branch has its cluster's colour where all below agree."""
    tree = average_tree(similarity)
    below = [{label} for label in labels.tolist()]
    for left, right, *_ in tree:
        below.append(below[int(left)] | below[int(right)])
    whole = [_colour(*found) if len(found) == 1 else "#888888" for found in below]
    drawn = dendrogram(tree, no_plot=True, link_color_func=lambda node: whole[node])
    figure = _new_figure(9, 1.6 + 0.2 * min(len(names), MOST_NAMES) + (1 if len(names) > MOST_NAMES else 0))
    axes = figure.subplots()
    for across, along, colour in zip(drawn["icoord"], drawn["dcoord"], drawn["color_list"], strict=True):
        axes.plot(along, across, color=colour, linewidth=1.2)
    axes.yaxis.tick_right()
    places = [10 * place + 5 for place in range(len(names))]
    if len(names) <= MOST_NAMES:
        axes.set_yticks(places, [names[row] for row in drawn["leaves"]], fontsize=7)
        for tick, row in zip(axes.get_yticklabels(), drawn["leaves"], strict=True):
            tick.set_color(_colour(labels[row]))
    else:
        axes.set_yticks([])
    least = max(0.0, 0.98 * float(tree[:, 2].min()) - 0.01)
    axes.set(title=title, xlabel="1 - cosine, mean over the pairs of two branches", ylim=(0, 10 * len(names)))
    axes.set_xlim(max(1.01 * float(tree[:, 2].max()), least + 1e-3), least)
    axes.spines[["left", "top", "right"]].set_visible(False)
    return figure


def _tree_order(similarity: np.ndarray) -> list[int]:
    return leaves_list(average_tree(similarity)).tolist() if len(similarity) > 1 else [0]


def _colour(label: int) -> str:
    return COLOURS[int(label) % len(COLOURS)]


def _rectangle(corner: tuple[float, float], size: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, size, size, fill=False, edgecolor=colour, linewidth=2)


def _new_figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = "drawing needs matplotlib, which is not installed: pip install 'peft-arrow[viz]'"
        raise ImportError(message) from error
    return Figure(figsize=(width, height), layout="constrained")
