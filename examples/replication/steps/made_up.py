"""Made-up tasks in the form of the data, for the smoke run: CI has no data and no Hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path


WORDS = "sun moon river stone cloud forest candle mirror garden window bridge market".split()
TASKS: dict[str, Callable[[str], str]] = {
    "upper_case": str.upper,
    "reversed": lambda word: word[::-1],
    "first_letter": lambda word: word[0],
    "plural": lambda word: f"{word}s",
}
HELD_OUT: dict[str, Callable[[str], str]] = {"last_letter": lambda word: word[-1], "doubled": lambda word: word * 2}


def write_made_up(folder: Path) -> Path:
    """Write four tasks to train on, two held out, and one benchmark; returns the folder."""
    for suite, tasks in (("train_suite", TASKS), ("heldout_sni", HELD_OUT)):
        for task, answer in tasks.items():
            rows = [
                {
                    "task": task,
                    "category": "words",
                    "split": "train" if place < 8 else "eval",
                    "instruction": f"Write the word as {task.replace('_', ' ')}.",
                    "input": word,
                    "output": answer(word),
                }
                for place, word in enumerate(WORDS)
            ]
            _write(folder / suite / f"{task}.jsonl", rows)
    options = ["one", "two"]
    rows = [{"input": f"How many words are here: {word}?\nAnswer:", "options": options, "gold": 0} for word in WORDS]
    _write(folder / "heldout_benchmarks" / "counting.jsonl", rows)
    return folder


def _write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
