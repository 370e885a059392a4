"""Which router and options beat plain Arrow, chosen on some tasks and reported on others."""

from __future__ import annotations

import random
from typing import Any

from peft_arrow.routers import ROUTERS

from .collect import Runs
from .numbers import Values, estimate, gaps, mean_of


SEED = 0  # of the split, whatever the seed of the libraries
PLAIN = "arrow"
# Not to be chosen: they are told the task, or are controls.
APART = ("oracle", "random")
SUITES = ("upstream", "sni")


def split_tasks(tasks: list[str]) -> tuple[list[str], list[str]]:
    """Half of the tasks for choosing, the others for reporting, drawn once."""
    order = sorted(tasks)
    random.Random(SEED).shuffle(order)
    return sorted(order[: len(order) // 2]), sorted(order[len(order) // 2 :])


def beyond(runs: Runs, *libraries: str) -> dict[str, Any] | None:
    """The winner of one library or of several, with its margin over plain Arrow on tasks that did not choose it.

    Every task has the same weight; the loss is in nats a token, with several libraries each row's mean over them. The
    best of those that need no data is told too.
    """
    by_library = [_losses(runs, library) for library in libraries]
    names = [name for name in by_library[0] if all(name in losses for losses in by_library)]
    if len(names) < 3 or PLAIN not in names:
        return None
    losses = {name: mean_of([one[name] for one in by_library]) for name in names}
    choosing, reporting = split_tasks(list(losses[PLAIN]))
    held_out = [task for task in reporting if task.startswith("sni.")]
    rows = []
    for name in names:
        told = {"name": name, "needs_rows": name in ROUTERS and ROUTERS[name].needs_data}
        for part, tasks in (("choosing", choosing), ("reporting", reporting), ("held_out", held_out)):
            own = {task: losses[name][task] for task in tasks if task in losses[name]}
            plain = {task: losses[PLAIN][task] for task in tasks}
            told[part] = estimate(own) if own else None
            told[f"{part}_gain"] = estimate(gaps(plain, own)) if own and name != PLAIN else None
        rows.append(told)
    rows.sort(key=lambda row: row["choosing"]["mean"])
    return {
        "tasks": {"choosing": len(choosing), "reporting": len(reporting), "held_out": len(held_out)},
        "rows": rows,
        "winner": rows[0]["name"],
        "winner_without_rows": next(row["name"] for row in rows if not row["needs_rows"]),
    }


def _losses(runs: Runs, library: str) -> dict[str, Values]:
    """Candidate -> task -> losses."""
    names = [name for name in runs if name.startswith(f"{library}/") and name.partition("/")[2] not in APART]
    return {
        name.partition("/")[2]: {
            f"{suite}.{task}": rows for suite in SUITES for task, rows in runs[name].get(suite, {}).items()
        }
        for name in names
    }
