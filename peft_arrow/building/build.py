"""What every kind of library is built from, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..training.data import Examples, joined
from ..training.setup import Setup
from ..training.stage import Stage, train_stage
from .budget import steps_of_groups


@dataclass(frozen=True)
class Options:
    """What single kinds take.

    Args:
        embedding (`str`): `"delta"` or `"paper"`: what MBC compares of two adapters.
        n_skills (`int`): LoRAs in each layer that the tasks share, in Poly and MHR.
        n_splits (`int`): parts of a layer's features with weights of their own, in MHR.
    """

    embedding: str = "delta"
    n_skills: int = 8
    n_splits: int = 4


DEFAULTS = Options()


@dataclass(frozen=True)
class Build:
    """What every kind is built from.

    Args:
        setup (`Setup`): base, plan and processes.
        parts (`Mapping[str, Examples]`): the tasks.
        steps (`Mapping[str, int]`): the steps that each task brings into the budget.
        folder (`Path`): where the stages lie.
        n_clusters (`int` or `"auto"`): clusters.
        seed (`int`): of partitions and clustering.
        options (`Options`): of single kinds.
    """

    setup: Setup = field(repr=False)
    parts: Mapping[str, Examples] = field(repr=False)
    steps: Mapping[str, int]
    folder: Path
    n_clusters: int | str
    seed: int
    options: Options = DEFAULTS

    def train(self, name: str, parts: Mapping[str, Examples], steps: Mapping[str, int]) -> Stage:
        """Train a stage's experts in a folder of its name."""
        setup, folder = self.setup, self.folder / name
        return train_stage(
            name, setup.base, parts, folder, setup.plan, setup.processes, steps=steps, progress=setup.progress
        )

    def train_groups(self, groups: Mapping[str, list[str]], steps: Mapping[str, int]) -> Stage:
        """Train one expert for each group of tasks."""
        joint = {group: joined(group, [self.parts[task] for task in tasks]) for group, tasks in groups.items()}
        return self.train("clusters", joint, steps_of_groups(groups, steps))


@dataclass(frozen=True)
class Built:
    """What a kind gives.

    Args:
        stages (`list[Stage]`): the last one holds the library's experts.
        groups (`dict[str, list[str]]`): the tasks of each expert.
        made (`dict[str, Any]`): more for the card's part on how it was made.
        pictures (`dict[Path, str]`): file -> caption, for the card.
    """

    stages: list[Stage]
    groups: dict[str, list[str]]
    made: dict[str, Any] = field(default_factory=dict)
    pictures: dict[Path, str] = field(default_factory=dict)
