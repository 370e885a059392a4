"""From the folder of a replication to the results of one seed: what the tables, claims and figures are made of."""

from __future__ import annotations

import json
from collections import defaultdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from steps.setting import Setting, kind_and_seed

from .numbers import Values


# Suite of the judge -> suite of the report -> measure: the benchmarks' right answers also have a loss.
MEASURES = {
    "upstream": {"upstream": "loss"},
    "sni": {"sni": "loss"},
    "benchmarks": {"benchmarks": "acc_paper", "answers": "loss"},
    "generated": {"generated": "rouge_l"},
    "code": {"code": "passed"},
}
Runs = dict[str, dict[str, Values]]  # method -> suite -> task -> values
# Stage of the costs -> its pieces, for a seed.
STAGES = {
    "judge": "judge-*-{seed}-*-*",
    "adapt": "adapt-*-{seed}",
    "similarity": "similarity-*-{seed}",
    "routing": "routing-*-{seed}",
    "pairs": "pair-{seed}-*",
}


def read_judged(root: Path, seed: int) -> Runs:
    """What was judged: `private/arrow` and the like -> suite -> task -> a value a row, rounds joined.

    A method has the rounds that are there without a gap, so that two methods' first rows are the same rows.
    """
    rounds: dict[str, dict[int, dict]] = defaultdict(dict)
    for path in sorted((root / "reports").glob("*.json")):
        library, number = path.stem.rpartition("-")[0], int(path.stem.rpartition("-")[2])
        name = next(part for part in _libraries(root) if library.startswith(f"{part}-"))
        kind, its = kind_and_seed(name)
        if its != seed:
            continue
        is_written = library == f"{name}-generated"
        data = json.loads(path.read_text(encoding="utf-8"))["libraries"][""]["methods"]
        for method, record in data.items():
            way = method if method in ("base", "shared") else f"{kind}/{method.replace('_parameter', '-parameter')}"
            cells = record["runs"][0]["tasks"]
            if is_written:  # the same rows, in a suite of their own: their measure is another
                cells = {f"generated.{task.partition('.')[2]}": cell for task, cell in cells.items()}
            rounds[way].setdefault(number, {}).update(cells)
    return {
        way: _joined([parts[number] for number in range(len(parts)) if number in parts])
        for way, parts in rounds.items()
    }


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


def read_adapted(root: Path, seed: int) -> dict[str, dict[str, Values]]:
    """Way of adapting -> share of the data -> task -> losses."""
    found: dict[str, dict[str, dict[str, list]]] = defaultdict(lambda: defaultdict(dict))
    for told in read_each(root, "adapted-losses", seed).values():
        found[told["way"]][str(told["share"])][told["task"]] = told["losses"]
    return {way: dict(shares) for way, shares in found.items()}


def read_base(root: Path) -> Values:
    """The base's losses on the rows that adapted models are judged on."""
    path = root / "adapted-losses" / "base.json"
    return json.loads(path.read_text(encoding="utf-8"))["losses"] if path.exists() else {}


def read_each(root: Path, folder: str, seed: int) -> dict[str, Any]:
    """Stem -> content of every JSON file of a folder that is of a seed."""
    paths = sorted((root / folder).glob(f"*-{seed}.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def read_costs(setting: Setting) -> dict[str, dict[str, float]]:
    """Stage -> experts, steps, tokens, seconds, and the peak memory of its process.

    Seconds are of a core, but for training, whose records have what a clock on the wall shows.
    """
    paths = sorted((setting.root / "done").glob("*.json"))
    done = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    found: dict[str, dict[str, float]] = {}
    for folder in sorted((setting.root / "libraries").glob(f"*-{setting.seed}-training/*")):
        library = folder.parent.name.removesuffix("-training")
        paths = [folder / "training.json", *sorted(folder.glob("[!.]*/training.json"))]  # Poly is one model
        records = [record for path in paths if path.exists() and (record := json.loads(path.read_text()))["steps"]]
        if records and f"train-{library}" in done:
            found[f"train {library}, {folder.name}"] = {
                "experts": len(records),
                "steps": sum(record["steps"] for record in records),
                "tokens": sum(record["tokens"] for record in records),
                "seconds": round(sum(record["seconds"] for record in records)),
                "peak_mib": done[f"train-{library}"]["peak_mib"],
            }
    for stage, pattern in STAGES.items():
        pieces = [piece for name, piece in done.items() if fnmatchcase(name, pattern.format(seed=setting.seed))]
        if pieces:
            found[stage] = {
                "pieces": len(pieces),
                "seconds": round(sum(piece.get("core_seconds", piece["seconds"]) for piece in pieces)),
                "peak_mib": max(piece["peak_mib"] for piece in pieces),
            }
    return found
