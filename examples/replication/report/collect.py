"""From the folder of a replication to its results: everything the tables, claims and figures are made of."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from steps.setting import Setting, kind_and_seed

from .numbers import Values, mean_of_seeds


# Suite of the judge -> suite of the report -> measure: the benchmarks' right answers also have a loss.
MEASURES = {
    "upstream": {"upstream": "loss"},
    "sni": {"sni": "loss"},
    "benchmarks": {"benchmarks": "acc_paper", "answers": "loss"},
}
Runs = dict[str, dict[int, dict[str, Values]]]  # method -> seed -> suite -> task -> values


def read_judged(root: Path) -> Runs:
    """What was judged: `private/arrow` and the like -> seed -> suite -> task -> a value a row, rounds joined.

    A method has the rounds that are there without a gap, so that two methods' first rows are the same rows.
    """
    rounds: dict[tuple[str, int], dict[int, dict]] = defaultdict(dict)
    for path in sorted((root / "reports").glob("*.json")):
        library, number = path.stem.rpartition("-")[0], int(path.stem.rpartition("-")[2])
        name = next(part for part in _libraries(root) if library.startswith(f"{part}-"))
        kind, seed = kind_and_seed(name)
        data = json.loads(path.read_text(encoding="utf-8"))["libraries"][""]["methods"]
        for method, record in data.items():
            way = method if method in ("base", "shared") else f"{kind}/{method.replace('_parameter', '-parameter')}"
            rounds[way, seed][number] = record["runs"][0]["tasks"]
    found: Runs = defaultdict(dict)
    for (way, seed), parts in rounds.items():
        found[way][seed] = _joined([parts[number] for number in range(len(parts)) if number in parts])
    return dict(found)


def _libraries(root: Path) -> list[str]:
    return sorted(
        (path.name for path in (root / "libraries").iterdir() if not path.name.endswith("-training")), key=len
    )


def _joined(rounds: list[dict]) -> dict[str, Values]:
    found: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for cells in rounds:
        for name, cell in cells.items():
            suite, _, task = name.partition(".")
            for shown, measure in MEASURES[suite].items():
                values = [round(value, 5) for value in cell["values"][measure]]
                found[shown].setdefault(task, []).extend(values)
    return {suite: dict(tasks) for suite, tasks in found.items()}


def over_seeds(runs: dict[int, dict[str, Values]], suite: str) -> Values | None:
    """Each row's mean over the seeds that have it; None where the suite was not judged."""
    known = [run[suite] for run in runs.values() if suite in run]
    return mean_of_seeds(known) if known else None


def read_adapted(root: Path) -> dict[str, dict[str, Values]]:
    """Way of adapting -> share of the data -> task -> losses; each row's mean over seeds."""
    found: dict[str, dict[str, dict[str, list]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for path in sorted((root / "adapted-losses").glob("*.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        if told["way"] != "base":
            found[told["way"]][str(told["share"])][told["task"]].append(told["losses"])
    return {
        way: {
            share: {task: [sum(row) / len(row) for row in zip(*runs)] for task, runs in tasks.items()}
            for share, tasks in shares.items()
        }
        for way, shares in found.items()
    }


def read_base(root: Path) -> Values:
    """The base's losses on the rows that adapted models are judged on."""
    path = root / "adapted-losses" / "base.json"
    return json.loads(path.read_text(encoding="utf-8"))["losses"] if path.exists() else {}


def read_each(root: Path, folder: str) -> dict[str, Any]:
    """Stem -> content of every JSON file of a folder."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((root / folder).glob("*.json"))}


def read_costs(setting: Setting) -> dict[str, dict[str, float]]:
    """Stage -> experts, steps, tokens, seconds, and the peak memory of its process."""
    done, found = read_each(setting.root, "done"), {}
    for folder in sorted((setting.root / "libraries").glob("*-training/*")):
        library = folder.parent.name.removesuffix("-training")
        records = [json.loads(path.read_text()) for path in sorted(folder.glob("[!.]*/training.json"))]
        if records and f"train-{library}" in done:
            found[f"train {library}, {folder.name}"] = {
                "experts": len(records),
                "steps": sum(record["steps"] for record in records),
                "tokens": sum(record["tokens"] for record in records),
                "seconds": round(sum(record["seconds"] for record in records)),
                "peak_mib": done[f"train-{library}"]["peak_mib"],
            }
    for stage in ("judge", "adapt", "similarity", "routing", "pair-"):
        pieces = [piece for name, piece in done.items() if name.startswith(stage)]
        if pieces:
            found[stage.strip("-")] = {
                "pieces": len(pieces),
                "seconds": round(sum(piece["seconds"] for piece in pieces)),
                "peak_mib": max(piece["peak_mib"] for piece in pieces),
            }
    return found
