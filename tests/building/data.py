"""What the building tests share: a base on disk and four small tasks."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from pathlib import Path

from tests.pico import pico_base, pico_tokenizer


QUICK = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.02,
    "max_length": 64,
    "save_steps": 2,
}
TASKS = {
    f"task{number}": [{"prompt": f"{letter}{number}:", "completion": f" {letter * 3}"} for letter in "abcdefgh"]
    for number in range(4)
}


def base_in(folder: Path) -> str:
    """Save the pico base and its tokenizer as `my-base`; returns its path."""
    pico_base().save_pretrained(folder / "my-base")
    pico_tokenizer().save_pretrained(folder / "my-base")
    return str(folder / "my-base")


class Crash(Exception):
    """No error that a task may fail with."""


def _crash() -> None:
    raise Crash("a fault of the program")


def _slow() -> None:
    print("trains as", os.getpid(), flush=True)
    time.sleep(300)


FAULTS = {"kill": lambda: os.kill(os.getpid(), signal.SIGKILL), "crash": _crash, "slow": _slow}


def main(root: str, output: str, kind: str, tasks: str = "4", clusters: str = "2") -> None:
    """Build in a process of its own, for tests that kill it or launch several.

    `FAULT` and `FAULT_IN_RANK` in the environment say what happens there in the place of the first training.
    """
    from peft_arrow import train_library

    if os.environ.get("FAULT_IN_RANK") == os.environ.get("RANK", "0"):
        jobs = importlib.import_module("peft_arrow.training.jobs")
        jobs.fit = lambda *arguments, **options: FAULTS[os.environ["FAULT"]]()
    library = train_library(
        str(Path(root) / "my-base"),
        {task: TASKS[task] for task in list(TASKS)[: int(tasks)]},
        kind=kind,
        output_dir=Path(root) / output,
        n_clusters=int(clusters),
        steps=15,
        sft_config=QUICK,
    )
    print(list(library))


if __name__ == "__main__":
    main(*sys.argv[1:])
