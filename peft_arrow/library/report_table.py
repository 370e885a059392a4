"""The table of reports: one line an adapter, in columns that fit the screen."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

from .base_ids import is_same_base, normalise_base
from .markdown import ELLIPSIS, plain


if TYPE_CHECKING:
    from .report import AdapterReport, AdapterReports

OK, NOTES, UNUSABLE = "ok", "usable, see notes", "cannot be used"
VERDICTS = {
    OK: "nothing was found that speaks against it.",
    NOTES: "it works; read what is said of it below.",
    UNUSABLE: "peft-arrow would refuse it; below is why, and what to do.",
}
NAME_WIDTH = 60


def verdict(report: AdapterReport, reports: AdapterReports) -> str:
    """One of `VERDICTS`; being a near-duplicate or standing out counts as a note."""
    if report.problems:
        return UNUSABLE
    compared = [name for pair in reports.duplicates for name in (pair.first, pair.second)]
    compared += [outlier.name for outlier in reports.outliers]
    return NOTES if report.warnings or report.name in compared else OK


def reports_table(reports: AdapterReports, width: int) -> str:
    """One line an adapter, at most `width` columns of a terminal where that is possible."""
    counted = any(report.downloads is not None for report in reports)
    titles = ["adapter", "verdict", "rank", "modules", "licence", "size", "base it names"]
    rows = [titles + (["downloads"] if counted else [])]
    for report in reports:
        row = [_label(report), verdict(report, reports), _ranks(report), _modules(report)]
        row += [report.license or "none", _size(report.size), _base(report.base_model, reports.base)]
        rows.append(row + ([f"{report.downloads or 0:,}"] if counted else []))
    widths = _fit([max(_shown_width(row[column]) for row in rows) for column in range(len(rows[0]))], width)
    lines = ["  ".join(_pad(text, size) for text, size in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * size for size in widths), *lines[1:]])


def _label(report: AdapterReport) -> str:
    """The name; of an adapter on the Hub the reference by which it is pulled."""
    is_on_hub = report.commit is not None or report.downloads is not None
    return plain(report.source if is_on_hub else report.name, NAME_WIDTH)


def _fit(widths: list[int], width: int) -> list[int]:
    """Shrink the base, modules, adapter and licence columns, in this order, until a line fits."""
    widths = list(widths)
    for column, least in ((6, 21), (3, 12), (0, 14), (4, 8), (6, 6), (3, 6), (0, 8)):
        too_much = sum(widths) + 2 * (len(widths) - 1) - width
        if too_much > 0:
            widths[column] = max(min(least, widths[column]), widths[column] - too_much)
    return widths


def _ranks(report: AdapterReport) -> str:
    if not report.ranks:
        return "?"
    return str(report.rank) if len(report.ranks) == 1 else f"{report.ranks[0]}-{report.ranks[-1]}"


def _modules(report: AdapterReport) -> str:
    names = [plain(name, 30) for name in report.target_modules]
    return (", ".join(names) if len(names) <= 2 else f"{len(names)} kinds") or "?"


def _base(name: str | None, base: str | None) -> str:
    return "same" if is_same_base(name, base) else plain((normalise_base(name) or "none").split("/")[-1], 60)


def _size(size: int | None) -> str:
    if size is None:
        return "?"
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= step:
            return f"{size / step:.{0 if size >= 100 * step else 1}f} {unit}"
    return f"{size} B"


def _shown_width(text: str) -> int:
    """Columns of a terminal: wide characters take two, combining ones none."""
    return sum(
        0 if unicodedata.combining(mark) else 2 if unicodedata.east_asian_width(mark) in "WF" else 1 for mark in text
    )


def _pad(text: str, width: int) -> str:
    while _shown_width(text) > width:
        text = text.removesuffix(ELLIPSIS)[:-1] + ELLIPSIS
    return text + " " * (width - _shown_width(text))
