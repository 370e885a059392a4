"""The report of a folder, and the page of the docs: tables between marks, so that nobody types a number."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from steps.setting import Setting

from . import analyses, tables
from .figures import draw
from .results import make_results
from .tables import Seeds


BLOCKS: dict[str, Callable[[Seeds], str]] = {
    "summary": tables.summary,
    "claims": tables.claims,
    "zero_shot": tables.zero_shot,
    "code": tables.code,
    "held_out": tables.held_out,
    "upstream": tables.upstream,
    "supervised": tables.supervised,
    "beyond_private": lambda seeds: analyses.beyond(seeds, "private"),
    "beyond_mbc": lambda seeds: analyses.beyond(seeds, "mbc"),
    "beyond_both": lambda seeds: analyses.beyond(seeds, "private-mbc"),
    "partition": analyses.partition,
    "similarity": analyses.similarity,
    "transfer": analyses.transfer,
    "clusters": analyses.clusters,
    "routing": analyses.routing,
    "errors_private": lambda seeds: analyses.routing_errors(seeds, "private"),
    "costs": analyses.costs,
    "large": analyses.large,
}
MARK = re.compile(r"<!-- begin (\w+) -->\n.*?<!-- end -->", re.DOTALL)
STEM = "replication"


def write_report(setting: Setting) -> str:
    """Write `results-<seed>.json`, and of all seeds in the folder `report.md` and `figures/`; returns the page."""
    setting.write(f"results-{setting.seed}.json", make_results(setting))
    seeds = read_seeds(setting.root, "results-")
    draw(seeds, setting.root / "figures")
    page = "\n\n".join(["# Replication", *(f"## {name}\n\n{block(seeds)}" for name, block in BLOCKS.items())]) + "\n"
    (setting.root / "report.md").write_text(page, encoding="utf-8")
    return page


def read_seeds(folder: Path, stem: str) -> dict[int, Any]:
    """Seed -> results, of the files `<stem><seed>.json` of a folder; they may have been made on several machines."""
    paths = {int(path.stem.removeprefix(stem)): path for path in folder.glob(f"{stem}*.json")}
    return {seed: json.loads(paths[seed].read_text(encoding="utf-8")) for seed in sorted(paths)}


def fill(page: str, results: Path) -> str:
    """The page with every block between marks made anew from the files of a folder of results."""
    seeds = read_seeds(results, f"{STEM}-")
    budgets = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in results.glob("budget-*.json")}
    blocks = {name: partial(block, seeds) for name, block in BLOCKS.items()}
    blocks["budget"] = partial(analyses.budget, budgets)
    return MARK.sub(lambda found: f"<!-- begin {found[1]} -->\n{blocks[found[1]]()}\n<!-- end -->", page)


def pages(docs: Path) -> list[Path]:
    """The pages that hold tables of the results."""
    return [docs / "replication.md", docs.parent / "README.md"]


def write_docs(setting: Setting, docs: Path) -> None:
    """Copy a seed's results into the docs, fill the pages' tables from all that are there, and draw their pictures.

    Raises:
        ValueError: the docs have results of this seed that the folder lacks, so they were made in another folder.
    """
    made = setting.root / f"results-{setting.seed}.json"
    kept = docs / "results" / f"{setting.config['name']}-{setting.seed}.json"
    if kept.exists():
        old, new = (json.loads(path.read_text(encoding="utf-8"))["methods"] for path in (kept, made))
        lost = [name for name in old if name not in new]
        if lost:
            raise ValueError(
                f"{str(kept)!r} tells of {lost[0]!r}, and {str(made)!r} does not: it was made in another folder. "
                "Remove it if these results are to replace it, or run another --seed."
            )
    kept.parent.mkdir(exist_ok=True)
    shutil.copyfile(made, kept)
    refresh(docs)


def refresh(docs: Path) -> None:
    """Fill the pages' tables from the results files of the docs, and draw their pictures."""
    for page in pages(docs):
        page.write_text(fill(page.read_text(encoding="utf-8"), docs / "results"), encoding="utf-8")
    draw(read_seeds(docs / "results", f"{STEM}-"), docs / "images", f"{STEM}_")
