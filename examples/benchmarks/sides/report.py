"""Tables for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .rounds import Times
from .side import BASE, NOTES, OURS, PLAIN
from .verify import DISAGREES, Agreement


YARDSTICKS = (BASE, PLAIN, OURS)


def time_rows(times: Times, facts: dict, agreements: Mapping[str, Agreement]) -> list[dict]:
    """One row a side: seconds, ratios to the yardsticks, how it was checked; or why it was not run.

    Args:
        times (`Times`): of all sides.
        facts (`dict`): what all rows have, such as the work and the number of experts.
        agreements (`Mapping[str, Agreement]`): of the check.
    """
    rows = []
    for name, seconds in times.seconds.items():
        agreement = agreements.get(name)
        rows.append(
            {
                **facts,
                "side": name,
                "seconds": times.median(name),
                "rounds": seconds,
                "once": name in times.once,
                "ratios": {other: times.ratio(name, other) for other in YARDSTICKS},
                "difference": None if agreement is None else agreement.difference,
                "note": NOTES.get(name, ""),
            }
        )
    return rows + [{**facts, "side": name, "missing": reason} for name, reason in times.absent.items()]


def markdown(rows: Sequence[dict], unit: str = "ms", extra: Mapping[str, Callable[[dict], str]] | None = None) -> str:
    """The rows of one work as a table in Markdown; further columns are made by `extra`, header -> row -> cell."""
    extra = extra or {}
    header = ["side", unit, *(f"/ {other}" for other in YARDSTICKS), *extra, "largest difference"]
    lines = [_line(header), _line(["---"] * len(header))]
    for row in rows:
        if "missing" in row:
            lines.append(_line([row["side"], row["missing"], *[""] * (len(header) - 2)]))
            continue
        ratios = [_number(row["ratios"][other], "{:.2f}") for other in YARDSTICKS]
        once = " (once)" if row["once"] else ""
        more = [make(row) for make in extra.values()]
        checked = "not compared" if row["difference"] is None else f"{row['difference']:.0e}"
        if row["side"] == BASE:
            checked = ""
        lines.append(_line([row["side"], f"{1000 * row['seconds']:.4g}{once}", *ratios, *more, checked]))
    notes = [f"{row['side']}: {row['note']}." for row in rows if row.get("note")]
    return "\n".join([*lines, *notes])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None, pattern: str) -> str:
    return "" if value is None else pattern.format(value)


def write(output: Path | None, name: str, machine: dict, settings: dict, rows: list[dict]) -> None:
    """Write `<name>.json` into the folder, if there is one."""
    if output is None:
        return
    output.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "settings": settings, "measured": rows}
    (output / f"{name}.json").write_text(json.dumps(content, indent=2, default=str))


def told_machine(machine: Mapping[str, object]) -> str:
    """One line."""
    return ", ".join(f"{name} {value}" for name, value in machine.items())


def stop_if_different(rows: Sequence[dict]) -> None:
    """End with exit status 1 where a side was not timed because it computes something else."""
    different = [f"{row['side']}: {row['missing']}" for row in rows if DISAGREES in row.get("missing", "")]
    if different:
        raise SystemExit("\n".join(dict.fromkeys(different)))
