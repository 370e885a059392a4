"""What the building tests share: a base on disk, four small tasks, and a stand-in for the clusterer."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import types
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


class StandInClusterer:
    """Every other task in one cluster: these tests are about what is trained, not about what is similar."""

    def __init__(self, n_clusters: int = 10, *, embedding: str = "delta", random_state: int = 42) -> None:
        self.n_clusters = n_clusters

    def fit(self, library) -> StandInClusterer:
        names = list(library)
        assert all(library[name].tensors for name in names), "the private adapters can be read"
        self.clusters_ = {f"cluster-{i}": names[i :: self.n_clusters] for i in range(self.n_clusters)}
        return self


def stand_in() -> types.ModuleType:
    """A module in the place of `peft_arrow.clustering`."""
    module = types.ModuleType("peft_arrow.clustering")
    module.MBCClusterer = StandInClusterer
    return module


def main(root: str, output: str, kind: str) -> None:
    """Build in a process of its own, for tests that kill it or launch several."""
    from peft_arrow import train_library

    sys.modules["peft_arrow.clustering"] = stand_in()
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
