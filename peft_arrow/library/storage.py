"""A library in a folder: `library.json`, `README.md` and one plain PEFT adapter an expert."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from enum import Enum
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors.torch import save_file
from tqdm.contrib.concurrent import thread_map

from .adapter import HUB_THREADS, Adapter
from .base_names import base_revision
from .card import MARK, library_card
from .files import CARD_NAME, WEIGHTS_NAME, WeightsFile, local_header, module_ranks, sha256_of
from .folders import new_folder
from .manifest import EXPERTS_FOLDER, MANIFEST_NAME, PICTURES_FOLDER, ExpertRecord, Manifest
from .reading import CONFIG_NAME, Location
from .versions import framework_versions


OURS = (MANIFEST_NAME, CARD_NAME, EXPERTS_FOLDER, PICTURES_FOLDER)
NAME_BYTES = 255


def save(library: Mapping[str, Adapter], folder: str | PathLike) -> Manifest:
    """Write a library; see `AdapterLibrary.save_pretrained`."""
    target = Path(folder).expanduser()
    kept = _other_files(target)
    for name in library:
        if len(os.fsencode(name)) > NAME_BYTES:
            raise ValueError(
                f"expert name {name!r} has {len(os.fsencode(name))} bytes, and file systems take {NAME_BYTES} for a "
                "folder's name; rename it with library.rename({old: new})."
            )
    with new_folder(target) as draft:
        manifest = write(library, draft)
        for path in kept:
            _copy(path, draft / path.name)
    for adapter in library.values():
        _follow(adapter, target, manifest)
    return manifest


def _follow(adapter: Adapter, target: Path, manifest: Manifest) -> None:
    """Where the weights were read from the folder that was replaced, read them from the new one from now on."""
    weights = adapter.tensors
    if isinstance(weights, WeightsFile) and weights.place.folder is not None:
        if weights.place.folder.resolve().is_relative_to(target.resolve()):
            folder = target / EXPERTS_FOLDER / adapter.name
            weights.move_to(Location(folder=folder, name=adapter.name, manifest=manifest))


def write(library: Mapping[str, Adapter], folder: Path) -> Manifest:
    """Write a library's files into an empty folder, several experts at a time."""

    def write_one(adapter: Adapter) -> ExpertRecord:
        return write_expert(adapter, folder / EXPERTS_FOLDER / adapter.name, library.base_model_name_or_path)

    with _quiet_downloads():
        records = thread_map(
            write_one, library.values(), max_workers=HUB_THREADS, desc="Saving experts", disable=len(library) < 5
        )
    revision = base_revision(library.values())
    manifest = Manifest(library.base_model_name_or_path, tuple(records), revision, library.notes)
    for picture in library.notes.pictures:
        (folder / PICTURES_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(library.picture(picture.file), folder / PICTURES_FOLDER / picture.file)
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    (folder / CARD_NAME).write_text(library_card(manifest, versions=framework_versions()), encoding="utf-8")
    return manifest


def write_expert(adapter: Adapter, folder: Path, base_model: str) -> ExpertRecord:
    """Write one adapter as PEFT does, with the library's base model in its config.

    Raises:
        ValueError: its file is missing, damaged or a pickle, or holds no LoRA factors.
    """
    folder.mkdir(parents=True)
    path = folder / WEIGHTS_NAME
    if isinstance(adapter.tensors, WeightsFile):
        sha256 = adapter.tensors.copy_to(path)
    else:
        save_file({key: tensor.contiguous() for key, tensor in adapter.tensors.items()}, path, {"format": "pt"})
        sha256 = sha256_of(path)
    ranks = module_ranks(local_header(str(path), adapter.source))
    alpha = adapter.config.get("lora_alpha", 8)
    if not ranks or isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise ValueError(
            f"{adapter.where}: it has {len(ranks)} lora_A tensors and "
            f"lora_alpha={alpha!r}; a LoRA has at least one, and a number."
        )
    config = {**adapter.config, "base_model_name_or_path": base_model, "inference_mode": True}
    text = json.dumps(config, indent=2, sort_keys=True, default=_plain)
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
    return ExpertRecord(
        name=adapter.name,
        rank=max(ranks.values()),
        alpha=float(alpha),
        target_modules=tuple(sorted({module.rpartition(".")[2] for module in ranks})),
        size=path.stat().st_size,
        sha256=sha256,
        origin=adapter.origin,
    )


def _plain(value: Any) -> Any:
    """What JSON has no form for, as PEFT writes it."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Enum):
        return value.value
    return str(value)


def _other_files(target: Path) -> list[Path]:
    """What an old library's folder holds beside the library, to be kept.

    Raises:
        ValueError: the target is a file, or a folder with other things than a library.
    """
    if not target.exists():
        return []
    if not target.is_dir():
        raise ValueError(f"folder {str(target)!r} is a file; give a new folder, or that of a library.")
    entries = sorted(target.iterdir())
    if entries and not (target / MANIFEST_NAME).is_file():
        raise ValueError(
            f"folder {str(target)!r} holds {entries[0].name!r} and no {MANIFEST_NAME}; give a new or empty folder, or "
            "that of a library, which is replaced."
        )
    return [path for path in entries if path.name not in OURS or _is_own_card(path)]


def _is_own_card(path: Path) -> bool:
    """Whether it is a card that a person wrote, or took over by removing our first line."""
    return path.name == CARD_NAME and MARK not in path.read_text(encoding="utf-8", errors="replace")


def _copy(path: Path, target: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.copytree(path, target, symlinks=True)
    else:
        shutil.copy2(path, target, follow_symlinks=False)


@contextlib.contextmanager
def _quiet_downloads() -> Iterator[None]:
    """One bar for all experts instead of one for each file."""
    was_off = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not was_off:
            enable_progress_bars()
