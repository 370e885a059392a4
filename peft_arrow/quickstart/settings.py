"""How the quickstart trains: settings that give useful experts in few steps, and what is built with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


# Where a build lies in the quickstart's folder, and what its processes read and leave in the work folder.
LIBRARY, WORK, DATA = "library", "library-training", "data"
PLAN_NAME, ERROR_NAME = "plan.json", "error.json"


@dataclass(frozen=True)
class TrainSettings:
    """How every adapter is trained; `base` None is SmolLM2. The same seed gives all adapters the same first A.

    `steps` are those that a task brings into the budget: 40 % go to its private adapter, the rest to the expert of its
    cluster. `clusters` is a number or "auto".
    """

    base: str | None = None
    steps: int = 40
    clusters: int | str = 4
    batch_size: int = 8
    learning_rate: float = 2e-3
    rank: int = 8
    alpha: int = 16
    rows: int = 240
    seed: int = 0

    def told(self) -> str:
        """One line for people."""
        return (
            f"Settings for few steps, not the paper's recipe: rank {self.rank}, alpha {self.alpha}, all linear "
            f"layers, learning rate {self.learning_rate:g}, {self.batch_size} rows a step, gradients clipped at 1, no "
            "dropout, no warm-up."
        )


@dataclass(frozen=True)
class BuildPlan:
    """All that a library is built from; JSON, for the processes that build it.

    Args:
        settings (`TrainSettings`): of the training.
        data (`Mapping[str, str]`): task -> its JSONL file.
        rows (`Mapping[str, str]`): task -> sha256 of that file.
        output (`str`): the library's folder.
        command (`str`): for the card.
    """

    settings: TrainSettings
    data: Mapping[str, str]
    rows: Mapping[str, str]
    output: str
    command: str = ""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> BuildPlan:
        """The plan that `asdict` made this of."""
        return cls(**{**content, "settings": TrainSettings(**content["settings"])})

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        return asdict(self)


@dataclass(frozen=True)
class Trained:
    """A library that was built.

    Args:
        library (`Path`): its folder.
        experts (`dict[str, Path]`): cluster -> folder of its expert.
        private (`dict[str, Path]`): task -> folder of its private adapter, in the order of the clusters.
        groups (`dict[str, list[str]]`): cluster -> its tasks.
        silhouette (`float`, *optional*): of the clusters; None where it has no value.
        steps (`dict[str, int]`): steps of each expert and each private adapter.
    """

    library: Path
    experts: dict[str, Path]
    private: dict[str, Path]
    groups: dict[str, list[str]]
    silhouette: float | None = None
    steps: dict[str, int] = field(default_factory=dict)

    def cluster_of(self, task: str) -> str:
        """The cluster of a task."""
        return next(cluster for cluster, tasks in self.groups.items() if task in tasks)
