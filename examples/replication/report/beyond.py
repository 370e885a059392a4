"""Which router and options beat plain Arrow, chosen on some tasks and reported on others."""

from __future__ import annotations

import random
from typing import Any

from .collect import Runs, over_seeds
from .numbers import estimate, gaps


SEED = 0
PLAIN = "arrow"
# Not to be chosen: they are told the task, or are controls.
APART = ("oracle", "random")
SUITES = ("upstream", "sni")


def split_tasks(tasks: list[str]) -> tuple[list[str], list[str]]:
    """Half of the tasks for choosing, the others for reporting, drawn once."""
    order = sorted(tasks)
    random.Random(SEED).shuffle(order)
    return sorted(order[: len(order) // 2]), sorted(order[len(order) // 2 :])


def beyond(runs: Runs, library: str) -> dict[str, Any] | None:
    """The winner of one kind of library, with its margin over plain Arrow on tasks that did not choose it.

    Every task has the same weight; the loss is in nats a token. Seed 0 alone, because all candidates have it.
    """
    names = [name.partition("/")[2] for name in runs if name.startswith(f"{library}/")]
    candidates = [name for name in names if name not in APART]
    if len(candidates) < 3 or PLAIN not in candidates:
        return None
    losses = {
        name: {
            f"{suite}.{task}": rows
            for suite in SUITES
            for task, rows in (over_seeds({0: runs[f"{library}/{name}"][0]}, suite) or {}).items()
        }
        for name in candidates
    }
    choosing, reporting = split_tasks(list(losses[PLAIN]))
    rows = []
    for name in candidates:
        told = {"name": name}
        for part, tasks in (("choosing", choosing), ("reporting", reporting)):
            own = {task: losses[name][task] for task in tasks if task in losses[name]}
            plain = {task: losses[PLAIN][task] for task in tasks}
            told[part] = estimate(own)
            told[f"{part}_gain"] = estimate(gaps(plain, own)) if name != PLAIN else None
        rows.append(told)
    rows.sort(key=lambda row: row["choosing"]["mean"])
    return {"tasks": {"choosing": len(choosing), "reporting": len(reporting)}, "rows": rows, "winner": rows[0]["name"]}
