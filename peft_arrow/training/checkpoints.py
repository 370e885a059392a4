"""Checkpoints of an expert that is not finished: which can be continued from, which are removed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


STATE_NAME = "trainer_state.json"


IDENTITY_NAME = "identity.json"


def checkpoints_of(folder: Path) -> Path:
    """Where the checkpoints of the expert in `folder` lie until it is finished; an expert's name has no first dot."""
    return folder.parent / f".{folder.name}.checkpoints"


def prepare_checkpoints(folder: Path, identity: dict[str, Any]) -> None:
    """Keep checkpoints of a killed run that trained in the same way, and remove all others."""
    mark = folder / IDENTITY_NAME
    try:
        same = json.loads(mark.read_text(encoding="utf-8")) == identity
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        mark.write_text(json.dumps(identity), encoding="utf-8")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; one that a kill cut short is removed.

    The trainer writes its state last, so a state that can be read is that of a whole checkpoint.
    """
    found = sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in reversed(found):
        try:
            json.loads((path / STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(path, ignore_errors=True)
        else:
            return path
    return None
