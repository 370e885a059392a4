"""Find and read the two files of an adapter, in a folder or on the Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file


CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
PEFT_ARROW_ROUTER = "arrow_router"
HUB_ERRORS = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, EntryNotFoundError, OSError)


@dataclass(frozen=True)
class Location:
    """A place that holds `adapter_config.json`: a folder, or a repository and a folder inside it.

    Args:
        folder (`Path`, *optional*): the local folder; None for the Hub.
        repo_id (`str`, *optional*): the Hub repository.
        subfolder (`str`, *optional*): the folder inside the repository.
        revision, token, cache_dir, local_files_only: passed to `hf_hub_download`.
    """

    folder: Path | None = None
    repo_id: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | None = None
    local_files_only: bool = False

    @property
    def label(self) -> str:
        """The last part of the path or id, from which a name is derived."""
        if self.folder is not None:
            return self.folder.resolve().name
        return (self.subfolder or self.repo_id).rstrip("/").split("/")[-1]

    def describe(self) -> str:
        """The reference in the form a user would write it."""
        if self.folder is not None:
            return str(self.folder)
        place = f"{self.repo_id}/{self.subfolder}" if self.subfolder else self.repo_id
        return f"{place}@{self.revision}" if self.revision else place

    def public_name(self) -> str:
        """The reference as it may be saved with a model: a Hub reference whole, of a folder its name alone."""
        return self.describe() if self.folder is None else self.label

    def file(self, filename: str) -> str:
        """Local path of a file of the adapter, downloaded if it is on the Hub; raises one of `HUB_ERRORS`."""
        if self.folder is not None:
            return str(self.folder / filename)
        return hf_hub_download(
            self.repo_id,
            filename,
            subfolder=self.subfolder,
            revision=self.revision,
            token=self.token,
            cache_dir=self.cache_dir,
            local_files_only=self.local_files_only,
        )


def locate(source: str | PathLike, *, subfolder: str | None = None, **hub: Any) -> list[Location]:
    """Every adapter that a reference stands for, in order.

    Raises:
        ValueError: nothing readable is there; the message says what was tried.
    """
    text = os.fspath(source)
    folder = Path(text).expanduser()
    is_path = isinstance(source, PathLike) or text.startswith(("/", "./", "../", "~")) or text in (".", "..")
    if is_path or folder.is_dir():
        return _locate_folder(text, folder / subfolder if subfolder else folder)
    return _locate_on_hub(text, subfolder, hub)


def _locate_folder(text: str, folder: Path) -> list[Location]:
    if not folder.exists():
        raise ValueError(f"adapter {text!r}: the path {str(folder)!r} does not exist.")
    if (folder / CONFIG_NAME).is_file():
        return [Location(folder=folder)]
    if (folder / PEFT_ARROW_ROUTER / CONFIG_NAME).is_file():
        return [Location(folder=folder / task) for task in _task_order(os.listdir(folder))]
    raise ValueError(f"adapter {text!r}: the folder {str(folder)!r} holds no {CONFIG_NAME}.")


def _locate_on_hub(text: str, subfolder: str | None, hub: dict[str, Any]) -> list[Location]:
    reference, _, revision = text.partition("@")
    parts = [part for part in reference.split("/") if part]
    if len(parts) < 2:
        raise ValueError(
            f"adapter {text!r}: there is no such folder, and a Hub id has the form 'user/repo' or 'user/repo/folder'."
        )
    inner = "/".join([*parts[2:], *([subfolder] if subfolder else [])]) or None
    place = Location(**{**hub, "repo_id": "/".join(parts[:2]), "subfolder": inner})
    if revision:
        place = replace(place, revision=revision)
    try:
        place.file(CONFIG_NAME)
    except HUB_ERRORS as error:
        # not in the cache and the Hub not asked is an EntryNotFoundError too, but says nothing of the repository
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return _locate_arrow_repo(text, place, error)
        raise ValueError(f"adapter {text!r}: there is no such folder, and the Hub answered: {error}") from error
    return [place]


def _locate_arrow_repo(text: str, place: Location, error: Exception) -> list[Location]:
    prefix = f"{place.subfolder}/" if place.subfolder else ""
    files = HfApi(token=place.token).list_repo_files(place.repo_id, revision=place.revision)
    if f"{prefix}{PEFT_ARROW_ROUTER}/{CONFIG_NAME}" in files:
        folders = {file[len(prefix) :].split("/")[0] for file in files if file.startswith(prefix)}
        return [replace(place, subfolder=prefix + task) for task in _task_order(folders)]
    raise ValueError(
        f"adapter {text!r}: there is no such folder, and the Hub repository {place.repo_id!r} holds no "
        f"{prefix}{CONFIG_NAME} ({error})"
    ) from error


def _task_order(names) -> list[str]:
    """The `task_i` folders that PEFT's `create_arrow_model` writes, by number."""
    numbers = [name.removeprefix("task_") for name in names if name.startswith("task_")]
    return [f"task_{number}" for number in sorted((n for n in numbers if n.isdecimal()), key=int)]


def read_config(place: Location) -> Mapping[str, Any]:
    """The content of `adapter_config.json`.

    Raises:
        ValueError: the file is missing or is not a JSON object.
    """
    try:
        text = Path(place.file(CONFIG_NAME)).read_text(encoding="utf-8")
        config = json.loads(text)
    except (*HUB_ERRORS, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"adapter {place.describe()!r}: {CONFIG_NAME} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"adapter {place.describe()!r}: {CONFIG_NAME} holds {type(config).__name__}, not an object.")
    return config


def read_tensors(place: Location) -> dict[str, torch.Tensor]:
    """The content of `adapter_model.safetensors`, on the CPU.

    Raises:
        ValueError: the file is missing, damaged, or there is only a pickle.
    """
    try:
        path = place.file(WEIGHTS_NAME)
        if not os.path.isfile(path):
            raise FileNotFoundError(path)
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"adapter {place.describe()!r}: {WEIGHTS_NAME} is damaged: {error}") from error
    except HUB_ERRORS as error:
        raise ValueError(f"adapter {place.describe()!r}: {_why_no_weights(place, error)}") from error


def _why_no_weights(place: Location, error: Exception) -> str:
    if place.folder is not None:
        has_pickle = (place.folder / PICKLE_NAME).is_file()
    else:
        try:
            has_pickle = bool(place.file(PICKLE_NAME))
        except HUB_ERRORS:
            has_pickle = False
    if has_pickle:
        return (
            f"there is only {PICKLE_NAME}, a pickle, which can run code when it is read; load it with PEFT if you "
            f"trust it and save it again, which writes {WEIGHTS_NAME}."
        )
    return f"{WEIGHTS_NAME} cannot be read: {error}"
