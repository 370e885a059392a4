"""What every kind of library is built from, and what it gives."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
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
MISSING_NAME = "missing.json"


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

    def train(
        self, name: str, parts: Mapping[str, Examples], steps: Mapping[str, int], overwrite: bool = False
    ) -> Stage:
        """Train a stage's experts in a folder of its name; `overwrite`: those again that changed since."""
        setup, folder = self.setup, self.folder / name
        plan = replace(setup.plan, overwrite=setup.plan.overwrite or overwrite)
        return train_stage(
            name, setup.base, parts, folder, plan, setup.processes, steps=steps, progress=setup.progress
        )

    def train_groups(
        self, groups: Mapping[str, list[str]], steps: Mapping[str, int], missing: Iterable[str] = ()
    ) -> Stage:
        """Train one expert for each group of tasks.

        Args:
            groups (`Mapping[str, list[str]]`): expert -> its tasks.
            steps (`Mapping[str, int]`): of each task.
            missing (`Iterable[str]`):
                tasks that failed and are in no group. A later run in which others are missing, or none, makes other
                groups and trains their experts again.
        """
        joint = {group: joined(group, [self.parts[task] for task in tasks]) for group, tasks in groups.items()}
        mark, missing = self.folder / MISSING_NAME, sorted(missing)
        changed = self.setup.processes.from_main(_was_missing(mark) not in (None, missing))
        if missing and self.setup.processes.is_main and not changed:
            mark.write_text(json.dumps(missing), encoding="utf-8")
        stage = self.train("clusters", joint, steps_of_groups(groups, steps), overwrite=changed)
        if changed and self.setup.processes.is_main and not stage.failures:
            mark.write_text(json.dumps(missing), encoding="utf-8")
        return stage


def _was_missing(mark: Path) -> list[str] | None:
    try:
        return json.loads(mark.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:  # cut short, so it is not known: as if others had been
        return [""]


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

    @property
    def failed_before(self) -> dict[str, str]:
        """What failed in the stages before the last, and why."""
        return {name: reason for stage in self.stages[:-1] for name, reason in stage.failures.items()}
