"""What the building tests share: a base on disk and four small tasks."""

from __future__ import annotations

import importlib
import os
import signal
import sys
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


def main(root: str, output: str, kind: str) -> None:
    """Build in a process of its own, for tests that kill it or launch several."""
    from peft_arrow import train_library

    if os.environ.get("DIE_IN_RANK") == os.environ.get("RANK", "0"):
        jobs = importlib.import_module("peft_arrow.training.jobs")
        jobs.fit = lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL)
    library = train_library(
        str(Path(root) / "my-base"),
        TASKS,
        kind=kind,
        output_dir=Path(root) / output,
        n_clusters=2,
        steps=15,
        sft_config=QUICK,
    )
    print(list(library))


if __name__ == "__main__":
    main(*sys.argv[1:])
