"""`training.json` beside an expert's weights: what it was trained with, so that a restart knows what is finished."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..library.versions import framework_versions


RECORD_NAME = "training.json"
PACKAGES = ("trl", "datasets", "accelerate")


@dataclass(frozen=True)
class TrainingRecord:
    """How one expert was trained.

    Args:
        name (`str`): the expert.
        tasks (`list[str]`): the tasks whose rows it saw.
        identity (`dict`): all that decides the result: base, data fingerprint, seeds, fields of both configs.
        steps (`int`): optimizer steps.
        tokens (`int`): tokens that went through the model, padding left out, repetitions counted.
        rows (`int`): rows of the data.
        seconds (`float`): of the last run; what a killed run took before is not in it.
        losses (`list[float]`): the logged losses.
        target_modules (`list[str]`): as resolved on the base.
        sources (`list[str]`): Hub ids of the datasets.
        versions (`dict`): of the packages.
    """

    name: str
    tasks: list[str]
    identity: dict[str, Any]
    steps: int
    tokens: int
    rows: int
    seconds: float
    losses: list[float]
    target_modules: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: all_versions())

    def write(self, folder: Path) -> None:
        """Write `training.json` into a folder."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False)
        (folder / RECORD_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> TrainingRecord | None:
        """The record of a folder; None where there is none.

        Raises:
            ValueError: the file is damaged.
        """
        path = folder / RECORD_NAME
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is damaged ({error}); delete the folder to train it again.") from error

    def told(self) -> str:
        """One line for people."""
        ends = [loss for loss in (self.losses[:1] + self.losses[-1:]) if math.isfinite(loss)]
        change = " -> ".join(f"{loss:.3g}" for loss in ends) or "not logged"
        return f"{self.name}: {self.steps} steps, {self.tokens:,} tokens, {self.seconds:.0f} s, loss {change}"


def all_versions() -> dict[str, str]:
    """Name -> version of what trained."""
    return {**framework_versions(), **{package: version(package) for package in PACKAGES}}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two identities, each in a few words; empty where nothing did."""
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return [_change(name, old.get(name), new.get(name)) for name in names]


def _change(name: str, old: Any, new: Any) -> str:
    if name == "data":
        return "the data is another"
    return f"{name} was {old!r} and is now {new!r}"


def check_unchanged(folder: Path, identity: Mapping[str, Any]) -> TrainingRecord | None:
    """The record of a finished expert that was trained in the same way; None where nothing is there yet.

    Raises:
        ValueError: it was trained in another way, which the message names, or something else lies there.
    """
    record = TrainingRecord.read(folder)
    if record is None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"folder {str(folder)!r} holds something else than an expert; give another output_dir.")
        return None
    changes = differences(record.identity, identity)
    if changes:
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        raise ValueError(
            f"expert {record.name!r} in {str(folder)!r} was trained in another way: {', '.join(changes[:3])}{more}; "
            "give another output_dir, or pass overwrite=True to train it again."
        )
    return record
