"""From the experts of a stage to a saved library with its card."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..library.library import AdapterLibrary
from ..library.manifest import MANIFEST_NAME
from .base import Base
from .errors import TrainingFailed
from .jobs import Plan
from .processes import Processes
from .record import all_versions
from .stage import Stage


def work_folder(output_dir: Path) -> Path:
    """Where the experts of a library are trained: beside it, so that the library itself appears whole."""
    return output_dir.parent / f"{output_dir.name}-training"


def check_output(output_dir: str | PathLike) -> Path:
    """The library's folder; a `ValueError` where something else than a library lies there."""
    target = Path(output_dir).expanduser()
    is_free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    if not is_free and not (target / MANIFEST_NAME).is_file():
        raise ValueError(
            f"output_dir={str(target)!r} holds something else than a library; give a new or empty folder."
        )
    return target


def check_named(base: Base) -> None:
    """A `ValueError` where the base has no name: a library names its base model."""
    if not base.name:
        raise ValueError("base has no name for the library to state; set base.config._name_or_path to its Hub id.")


def finish(
    stage: Stage,
    base: Base,
    target: Path,
    processes: Processes,
    made: Mapping[str, Any],
    description: str,
    failures: Mapping[str, str] | None = None,
    pictures: Mapping[Path, str] | None = None,
) -> AdapterLibrary:
    """Save a stage's experts as a library with its card, which shows `pictures` (file -> caption).

    Raises:
        TrainingFailed: some experts failed, of this stage or of `failures`; the others are saved, and the card names
            what is missing.
        OSError: the library cannot be saved; its experts stay.
    """
    failed = {**(failures or {}), **stage.failures}
    library = stage.library(base.name)
    if library is not None:
        told = {**made, **({"failed": failed} if failed else {})}
        if processes.is_main:
            _save(library.describe(description, made=told, pictures=pictures or {}), target)
        processes.gather([])
        library = AdapterLibrary.from_pretrained(target)
    if failed:
        raise TrainingFailed(failed, library, str(target))
    return library


def _save(library: AdapterLibrary, target: Path) -> None:
    try:
        library.save_pretrained(target)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"the library cannot be saved in {str(target)!r}: {error}; its experts are kept in "
            f"{str(work_folder(target))!r}, and the same again saves it without training."
        ) from error


def told_of(stage: Stage, plan: Plan) -> dict[str, Any]:
    """What a card tells of how the experts of a stage were trained: seeds, the recipe's main fields, versions."""
    identity = next(iter(stage.records.values())).identity if stage.records else {}
    fields = (
        "lora.r lora.lora_alpha lora.lora_dropout sft.learning_rate sft.lr_scheduler_type sft.weight_decay "
        "sft.max_grad_norm sft.per_device_train_batch_size sft.gradient_accumulation_steps sft.max_length"
    ).split()
    return {
        **{name: identity[name] for name in ("base_revision", "base_dtype") if name in identity},
        "seeds": {"init": plan.init_seed, "training": identity.get("sft.seed")},
        "recipe": {name.partition(".")[2]: identity[name] for name in fields if name in identity},
        "versions": all_versions(),
    }
