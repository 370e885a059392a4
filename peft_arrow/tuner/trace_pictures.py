"""Pictures of a routing trace: heat maps of shares. Needs matplotlib, from the extra `viz`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .trace_stats import layer_labels, routing_entropy, routing_shares


if TYPE_CHECKING:
    from .trace import RoutingTrace

FRAMED = "(red frame: the task's own expert)"
AXES = {"all": "", "task": "task of the tokens", "layer": "layer", "kind": "kind of module", "module": "module"}


def plot_routing(
    trace: RoutingTrace, path: str | PathLike, by: str = "layer", own_experts: Mapping[str, str] | None = None
) -> None:
    """Draw the experts' shares, groups down and experts across; arguments as for `RoutingTrace.plot`.

    Raises:
        ValueError: nothing was recorded, or no tasks where `by` is `"task"`.
        ImportError: matplotlib is missing.
    """
    shares = routing_shares(trace, by)
    if not shares:
        what = "no tasks; give them as trace_routing(tasks=[...])" if trace.steps else "no forward pass"
        raise ValueError(f"by={by!r} cannot be drawn: the trace holds {what}.")
    if by == "task":
        own = own_experts if own_experts is not None else {task: task for task in trace.expert_names}
        draw_tasks(shares, trace.expert_names, path, own, title="Share of the routing weight of each task's tokens")
        return
    groups = list(shares)
    draw_heat_map(
        list(shares.values()),
        path,
        title=f"Share of the routing weight per {AXES[by] or 'expert'}",
        columns=("expert", trace.expert_names),
        rows=(AXES[by], layer_labels(groups) if by == "layer" else groups),
        line=[found.experts for found in routing_entropy(trace, by).values()] if by == "layer" else None,
    )


def draw_tasks(
    shares: Mapping[str, Sequence[float]],
    experts: Sequence[str],
    path: str | PathLike,
    own: Mapping[str, str],
    *,
    title: str,
) -> None:
    """Tasks down, experts across, with the percentages; the own expert of a task is framed.

    Args:
        shares (`Mapping[str, Sequence[float]]`): task -> share of each expert, in the order in which they are drawn.
        experts (`Sequence[str]`): the experts' names.
        path (`str` or `PathLike`): the picture.
        own (`Mapping[str, str]`): task -> its own expert, where it has one.
        title (`str`): what the picture shows.
    """
    framed = [(row, list(experts).index(own[task])) for row, task in enumerate(shares) if own.get(task) in experts]
    draw_heat_map(
        list(shares.values()),
        path,
        title=title + (f"\n{FRAMED}" if framed else ""),
        columns=("expert (adapter)", experts),
        rows=(AXES["task"], list(shares)),
        annotate=True,
        framed=framed,
    )


def draw_heat_map(
    values: Sequence[Sequence[float]],
    path: str | PathLike,
    *,
    title: str,
    columns: tuple[str, Sequence[str]],
    rows: tuple[str, Sequence[str]],
    annotate: bool = False,
    framed: Sequence[tuple[int, int]] = (),
    line: Sequence[float] | None = None,
) -> None:
    """One heat map of shares from 0 to 1; `columns` and `rows` are an axis label and its ticks.

    Args:
        values (`Sequence[Sequence[float]]`): a row of shares for each tick of `rows`.
        path (`str` or `PathLike`): PNG, PDF or SVG.
        title (`str`): above the picture.
        columns, rows (`tuple[str, Sequence[str]]`): axis label and ticks.
        annotate (`bool`): whether the percentages are written into the cells.
        framed (`Sequence[tuple[int, int]]`): cells (row, column) with a red frame.
        line (`Sequence[float]`, *optional*): the experts that share a token in each row, drawn beside.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    labels = 0.08 * max(0, max(map(len, rows[1])) - 12)
    height, width = 1.8 + 0.24 * len(rows[1]), 3.2 + (0.55 if annotate else 0.42) * len(columns[1]) + labels
    figure = new_figure(max(width, 5.0) + (1.8 if line is not None else 0.0), max(height, 3.0))
    beside = {"ncols": 2, "sharey": True, "width_ratios": [max(width, 5.0), 1.6]} if line is not None else {}
    drawn = figure.subplots(**beside)
    axes, plain = drawn if line is not None else (drawn, None)
    top = max(max(row) for row in values) or 1.0
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    figure.suptitle(title, wrap=True)
    _label(axes, columns, rows)
    if annotate:
        _write_shares(axes, values, top)
    _frame(axes, framed)
    figure.colorbar(image, ax=axes, format=lambda value, _: f"{100 * value:.0f} %")
    if plain is not None:
        plain.plot(line, range(len(line)), marker=".", color="tab:orange")
        plain.set_xlim(0, max(max(line), 1.0) * 1.1)
        plain.set_xlabel("experts a token,\nexp(entropy)")
        plain.grid(axis="x", alpha=0.3)
    figure.savefig(Path(path), dpi=130)


def _label(axes: Any, columns: tuple[str, Sequence[str]], rows: tuple[str, Sequence[str]]) -> None:
    axes.set_xlabel(columns[0])
    axes.set_ylabel(rows[0])
    # A dollar sign in a task's name is no formula.
    axes.set_xticks(
        range(len(columns[1])), columns[1], rotation=45, ha="right", rotation_mode="anchor", parse_math=False
    )
    axes.set_yticks(range(len(rows[1])), rows[1], parse_math=False)


def _write_shares(axes: Any, values: Sequence[Sequence[float]], top: float) -> None:
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            color = "white" if value > 0.6 * top else "black"
            axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=color)


def _frame(axes: Any, cells: Sequence[tuple[int, int]]) -> None:
    axes.autoscale(False)
    for y, x in cells:
        corners = ((x - 0.5, x + 0.5, x + 0.5, x - 0.5, x - 0.5), (y - 0.5, y - 0.5, y + 0.5, y + 0.5, y - 0.5))
        axes.plot(*corners, color="tab:red", linewidth=1.5, clip_on=False)


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure in inches that belongs to no window and no global state.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = "drawing needs matplotlib, which is not installed: pip install 'peft-arrow[viz]'"
        raise ImportError(message) from error
    return Figure(figsize=(width, height), layout="constrained")
