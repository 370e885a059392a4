"""Reports as plain text for people who have read no documentation. Names and texts of strangers are made harmless."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from .markdown import plain
from .report_table import NAME_WIDTH, VERDICTS, reports_table, verdict
from .spectrum import STATISTICS


if TYPE_CHECKING:
    from .report import AdapterReports

DEFAULT_WIDTH, LEAST_WIDTH = 100, 40
# A sentence said of so many adapters is printed once, with their names.
SHARED = 3
SCREEN = (
    "Unusual weights: these updates differ from those of the other adapters here (score: robust standard deviations "
    "from the others' median). That is no verdict: a larger rank, longer training or a rare task does it too, and a "
    "poisoned adapter need not stand out. Look at where they come from and try them."
)
TWINS = (
    "Near-duplicates: these make nearly the same change to the model (cosine 1 and distance 0: the very same), and "
    "both would take a place among a token's experts. Keep one of each pair."
)


def reports_text(reports: AdapterReports, width: int | None = None) -> str:
    """The text of `AdapterReports.table`."""
    width = max(width or _screen_width(), LEAST_WIDTH)
    parts = [_head(reports, width)]
    if len(reports):
        parts += [reports_table(reports, width), _legend(reports, width)]
    parts += [_findings(reports, width), _serving(reports, width), _duplicates(reports, width)]
    parts += [_outliers(reports, width), *(_wrapped(remark, width) for remark in reports.remarks)]
    return "\n\n".join(part for part in parts if part)


def _head(reports: AdapterReports, width: int) -> str:
    given = [verdict(report, reports) for report in reports]
    counts = "; ".join(f"{given.count(name)} {name}" for name in VERDICTS if name in given)
    base = plain(reports.base, 300) if reports.base else "none given, so nothing is said about fitting one"
    count = f"{len(reports)} adapter{'' if len(reports) == 1 else 's'}"
    return _wrapped(f"{count}: {counts or 'nothing to show'}.", width) + "\n" + _wrapped(f"Base model: {base}.", width)


def _screen_width() -> int:
    return shutil.get_terminal_size((DEFAULT_WIDTH, 24)).columns if sys.stdout.isatty() else DEFAULT_WIDTH


def _wrapped(text: str, width: int, first: str = "", rest: str = "") -> str:
    return textwrap.fill(
        text, width, initial_indent=first, subsequent_indent=rest, break_long_words=True, break_on_hyphens=False
    )


def _legend(reports: AdapterReports, width: int) -> str:
    given = {verdict(report, reports) for report in reports}
    return "\n".join(_wrapped(f"{name}: {text}", width, rest="  ") for name, text in VERDICTS.items() if name in given)


def _findings(reports: AdapterReports, width: int) -> str:
    """What was found, by adapter; what is the same for several of them, once."""
    owners: dict[tuple[str, str], list[str]] = {}
    for report in reports:
        for finding in (*report.problems, *report.warnings):
            owners.setdefault((finding.code, str(finding)), []).append(report.name)
    parts = []
    for report in reports:
        own = [
            finding
            for finding in (*report.problems, *report.warnings)
            if len(owners[finding.code, str(finding)]) < SHARED
        ]
        if own:
            head = f"{plain(report.name, NAME_WIDTH)}: {verdict(report, reports)} ({plain(report.source, 200)})"
            parts.append("\n".join([_wrapped(head, width, rest="  "), *(_item(finding, width) for finding in own)]))
    for (code, text), names in owners.items():
        if len(names) >= SHARED:
            parts.append(_wrapped(f"{_names(names)}:", width, rest="  ") + "\n" + _item(text, width, code))
    return "\n\n".join(parts)


def _item(text: str, width: int, code: str | None = None) -> str:
    return _wrapped(f"{plain(text, 700)} [{code or text.code}]", width, "  - ", "    ")


def _serving(reports: AdapterReports, width: int) -> str:
    owners: dict[str, list[str]] = {}
    for report in reports:
        for note in report.notes:
            owners.setdefault(str(note), []).append(report.name)
    lines = [_wrapped(f"{_names(names)}: {plain(text, 300)}", width, "  - ", "    ") for text, names in owners.items()]
    return "\n".join([_wrapped("Outside of peft-arrow:", width), *lines]) if lines else ""


def _duplicates(reports: AdapterReports, width: int) -> str:
    if not reports.duplicates:
        return ""
    lines = []
    for pair in reports.duplicates:
        text = f"{_names([pair.first, pair.second])}: cosine {pair.cosine:.4f}, distance {pair.distance:.3f}."
        lines.append(_wrapped(text, width, "  - ", "    "))
    return "\n".join([_wrapped(TWINS, width), *lines])


def _outliers(reports: AdapterReports, width: int) -> str:
    found: dict[str, list[str]] = {}
    for outlier in reports.outliers:
        text = f"{STATISTICS[outlier.statistic].text} {outlier.value:.3g}, the others' {outlier.median:.3g}"
        found.setdefault(outlier.name, []).append(f"{text} (score {outlier.score:+.0f})")
    lines = [
        _wrapped(f"{_names([name])}: {'; '.join(texts)}.", width, "  - ", "    ") for name, texts in found.items()
    ]
    return "\n".join([_wrapped(SCREEN, width), *lines]) if lines else ""


def _names(names: Sequence[str] | Iterable[str]) -> str:
    shown = [plain(name, NAME_WIDTH) for name in names]
    return ", ".join(shown if len(shown) <= 6 else [*shown[:5], f"{len(shown) - 5} more"])
