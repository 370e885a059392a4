"""A report as plain text and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .measures import MEASURES, measure_of
from .shares import largest_change, mean_shares, own_share
from .statistics import Difference, task_mean


if TYPE_CHECKING:
    from .report import EvaluationReport

REFERENCES = ("base", "uniform")


@dataclass(frozen=True)
class Table:
    """Cells with a title above and notes below; the first line is the head."""

    title: str
    cells: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def number(value: float | None, measure: str) -> str:
    """A value as it is printed: shares in percent, others with three digits."""
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if measure_of(measure).kind == "share" else f"{value:.3f}"


def signed(difference: Difference | None, measure: str) -> str:
    """A difference with its interval; one whose interval holds 0 says so."""
    if difference is None:
        return "-"
    told = plain(difference, measure)
    return told if difference.is_clear else f"no difference {told[told.index('[') :]}"


def plain(difference: Difference, measure: str) -> str:
    """A difference with its interval; shares in points."""
    scale, digits = (100, 1) if measure_of(measure).kind == "share" else (1, 3)
    mean, low, high = (f"{scale * value:+.{digits}f}" for value in (difference.mean, difference.low, difference.high))
    return f"{mean} [{low}, {high}]"


def all_tables(report: EvaluationReport) -> list[Table]:
    """The tables in order: means, differences, routing, and each measure by task."""
    tables = [_means(report), *_differences(report), *_routing(report)]
    return [*tables, *(_by_task(report, key) for key in report.measures)]


def _means(report: EvaluationReport) -> Table:
    keys = report.measures
    counts = {name: len(method.values(keys[0])) for name, method in report.methods.items()}
    lines = [["method", *keys]]
    for name in report.methods:
        cells = []
        for key in keys:
            spread = report.spread(name, key)
            cells.append(
                number(report.mean(name, key), key) + (f" ± {number(spread, key)}" if spread is not None else "")
            )
        part = "" if counts[name] == max(counts.values()) else f" ({counts[name]} of {max(counts.values())} tasks)"
        lines.append([name + part, *cells])
    rows = sum(task["rows"] for task in report.data["tasks"].values())
    notes = [f"{rows} judged rows of {len(report.data['tasks'])} tasks; every task has the same weight."]
    several = {len(method.runs) for method in report.methods.values()} - {1}
    if several:
        notes.append(f"±: standard deviation over {max(several)} seeds.")
    return Table("Means over tasks", lines, [*notes, *(f"{key}: {measure_of(key).title}." for key in keys)])


def _differences(report: EvaluationReport) -> list[Table]:
    tables = []
    for kind in REFERENCES:
        pairs = [(name, report.reference(name, kind)) for name in report.methods]
        pairs = [(name, other) for name, other in pairs if other is not None]
        if not pairs:
            continue
        lines = [["method", *report.measures]]
        for name, other in pairs:
            found = (report.difference(name, other, key) for key in report.measures)
            lines.append([name, *(signed(gap, key) for gap, key in zip(found, report.measures, strict=True))])
        draws = report.data["settings"]["draws"]
        note = (
            f"Mean difference with a 95 % bootstrap interval over rows ({draws:,} resamples, paired, within tasks). "
            "No difference: the interval holds 0. loss: below 0 is better; the others: above 0, shares in points. Of "
            "twenty intervals one leaves out 0 by chance."
        )
        tables.append(Table(f"Method minus {kind}", lines, [note]))
    return tables


def _routing(report: EvaluationReport) -> list[Table]:
    lines = [["method", "most weight", "share", "own expert", "by chance", "change between tasks"]]
    for name, method in report.methods.items():
        shares = method.shares()
        if not shares:
            continue
        library = report.data["libraries"][method.library]
        experts = library["experts"]
        means = mean_shares(list(shares.values()))
        top = max(range(len(means)), key=means.__getitem__)
        place = {task: experts.index(expert) for task, expert in library["own"].items()}
        own = own_share(shares, place) if method.kind == "routed" else None
        chance = "-" if own is None else number(1 / len(experts), "acc")
        top_name = experts[top] if top < len(experts) else "(base)"
        change = number(largest_change(list(shares.values())), "acc") if len(shares) > 1 else "-"
        lines.append([name, top_name, number(means[top], "acc"), number(own, "acc"), chance, change])
    if len(lines) == 1:
        return []
    traced = report.data["settings"]["traced_rows"]
    notes = [
        f"Shares of the routing weight over all layers, of at most {traced} rows a task. own expert: the share of the "
        "task's own one. change between tasks: by how much the shares of a layer differ at most between two tasks; a "
        "router that does not look at the tokens has 0."
    ]
    return [Table("Where the tokens went", lines, notes)]


def _by_task(report: EvaluationReport, key: str) -> Table:
    columns = {name: method.values(key) for name, method in report.methods.items()}
    tasks = [task for task in report.data["tasks"] if any(task in values for values in columns.values())]
    lines = [["task", "rows", *columns]]
    for task in tasks:
        means = (task_mean(values[task]) if task in values else None for values in columns.values())
        lines.append([task, str(report.data["tasks"][task]["rows"]), *(number(mean, key) for mean in means)])
    lines.append(["mean", "", *(number(report.mean(name, key), key) for name in columns)])
    return Table(f"{key} by task", lines, [] if key in MEASURES else [measure_of(key).title + "."])


def legend(report: EvaluationReport) -> list[str]:
    """What each method is, one line each."""
    return [f"{name}: {method.record['told']}." for name, method in report.methods.items()]


def header(report: EvaluationReport) -> list[str]:
    """What was judged."""
    data = report.data
    few = [task["selection_rows"] for task in data["tasks"].values() if task["selection_rows"]]
    chosen = f"chosen on {sum(few)} rows for selection of {len(few)} tasks"
    lines = [
        f"Base: {data['base']['name']}; judged in {data['seconds']:.0f} s, without what was kept of earlier calls"
    ]
    for label, library in data["libraries"].items():
        best = f"; best single expert: {library['best_single']!r}, {chosen}" if library["best_single"] else ""
        lines.append(f"Library{f' {label}' if label else ''}: {len(library['experts'])} experts{best}")
    return [*lines, *data["notes"]]


def as_text(report: EvaluationReport) -> str:
    """The report in columns of fixed width."""
    parts = ["\n".join(header(report)), _text_list("What to look at", report.what_to_look_at())]
    parts += [_text_table(table) for table in all_tables(report)]
    return "\n\n".join([*parts, _text_list("Methods", legend(report))])


def _text_list(title: str, lines: Sequence[str]) -> str:
    return "\n".join([title, *(f"- {line}" for line in lines)])


def _text_table(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(*table.cells, strict=True)]
    lines = []
    for cells in table.cells:
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        lines.append("  ".join([cells[0].ljust(widths[0]), *rest]).rstrip())
    rule = "-" * max(map(len, lines))
    return "\n".join([table.title, rule, lines[0], rule, *lines[1:], rule, *table.notes])


def as_markdown(report: EvaluationReport) -> str:
    """The report as a page."""
    parts = ["# Evaluation", "\n".join(f"- {line}" for line in header(report)), "## What to look at"]
    parts.append("\n".join(f"- {line}" for line in report.what_to_look_at()))
    for table in all_tables(report):
        parts += [f"## {table.title}", _markdown_table(table.cells), *table.notes]
    return "\n\n".join([*parts, "## Methods", "\n".join(f"- {line}" for line in legend(report))]) + "\n"


def _markdown_table(cells: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(cells[0]) - 1), *lines[1:]])
