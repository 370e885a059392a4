"""The report of a folder, and the page of the docs: tables between marks, so that nobody types a number."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steps.setting import Setting

from . import tables
from .figures import draw
from .results import make_results


BLOCKS: dict[str, Callable[[dict], str]] = {
    "summary": tables.summary,
    "claims": tables.claims,
    "zero_shot": tables.zero_shot,
    "held_out": tables.held_out,
    "upstream": tables.upstream,
    "supervised": tables.supervised,
    "beyond_private": lambda results: tables.beyond(results, "private"),
    "beyond_mbc": lambda results: tables.beyond(results, "mbc"),
    "beyond_both": lambda results: tables.beyond(results, "private-mbc"),
    "partition": tables.partition,
    "similarity": tables.similarity,
    "transfer": tables.transfer,
    "clusters": tables.clusters,
    "routing": tables.routing,
    "errors_private": lambda results: tables.routing_errors(results, "private-0"),
    "costs": tables.costs,
    "large": tables.large,
}
MARK = re.compile(r"<!-- begin (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def write_report(setting: Setting) -> str:
    """Write `results.json`, `report.md` and `figures/` into the folder; returns the page."""
    results = make_results(setting)
    setting.write("results.json", results)
    draw(results, setting.root / "figures")
    page = "\n\n".join(["# Replication", *(f"## {name}\n\n{block(results)}" for name, block in BLOCKS.items())]) + "\n"
    (setting.root / "report.md").write_text(page, encoding="utf-8")
    return page


def fill(page: str, results: dict[str, Any]) -> str:
    """The page with every block between marks made anew from the results."""
    return MARK.sub(lambda found: f"<!-- begin {found[1]} -->\n{BLOCKS[found[1]](results)}\n<!-- end -->", page)


def pages(docs: Path) -> list[Path]:
    """The pages that hold tables of the results."""
    return [docs / "replication.md", docs.parent / "README.md"]


def write_docs(results: Path, docs: Path) -> None:
    """Copy a results file into the docs, fill the page's tables from it, and draw its pictures."""
    content = json.loads(results.read_text(encoding="utf-8"))
    kept = docs / "results" / "replication.json"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for page in pages(docs):
        page.write_text(fill(page.read_text(encoding="utf-8"), content), encoding="utf-8")
    draw(content, docs / "images", "replication_")
