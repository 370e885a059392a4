"""Where adapters and libraries lie: a folder, or a repository of the Hub and a folder inside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

from .manifest import EXPERTS_FOLDER, MANIFEST_NAME, PICTURES_FOLDER, ExpertRecord, Manifest
from .retrying import CLIENT_ERROR, retried


CONFIG_NAME = "adapter_config.json"
PEFT_ARROW_ROUTER = "arrow_router"
# The HTTP client's own error too: huggingface_hub wraps answers of the Hub, but not every lost connection.
HUB_ERRORS = (CLIENT_ERROR, HFValidationError, LocalEntryNotFoundError, EntryNotFoundError, OSError)
READ_ERRORS = (*HUB_ERRORS, ValueError)  # what cannot be had, or is not what it should be
T = TypeVar("T")


@dataclass(frozen=True)
class Location:
    """A place that holds `adapter_config.json`: a folder, or a repository and a folder inside it.

    Args:
        folder (`Path`, *optional*): the local folder; None for the Hub.
        repo_id (`str`, *optional*): the Hub repository.
        subfolder (`str`, *optional*): the folder inside the repository.
        revision, token, cache_dir, local_files_only: passed to `hf_hub_download`.
        commit (`str`, *optional*): what the revision was when it was looked up; files are taken from there.
        name (`str`, *optional*): the expert's name, where the place is a part of a library.
        manifest (`Manifest`, *optional*): that library's `library.json`.
    """

    folder: Path | None = None
    repo_id: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | None = None
    local_files_only: bool = False
    commit: str | None = None
    name: str | None = None
    manifest: Manifest | None = field(default=None, repr=False)

    @cached_property
    def record(self) -> ExpertRecord | None:
        """What `library.json` says of the expert."""
        if self.manifest is None:
            return None
        return next(record for record in self.manifest.experts if record.name == self.name)

    @property
    def label(self) -> str:
        """The expert's name, or the last part of the path or id, from which a name is derived."""
        if self.name is not None:
            return self.name
        if self.folder is not None:
            return self.folder.resolve().name
        return (self.subfolder or self.repo_id).rstrip("/").split("/")[-1]

    def describe(self) -> str:
        """The reference in the form a user would write it."""
        return str(self.folder) if self.folder is not None else self.hub_name(with_revision=True)

    def hub_name(self, with_revision: bool = False) -> str:
        """`user/repo`, `user/repo/folder`, and `@revision` where one was asked for."""
        place = f"{self.repo_id}/{self.subfolder}" if self.subfolder else self.repo_id
        return f"{place}@{self.revision}" if self.revision and with_revision else place

    def public_name(self) -> str:
        """The reference as it may be saved with a model: a Hub reference whole, of a folder its name alone."""
        return self.describe() if self.folder is None else self.label

    def file(self, filename: str) -> str:
        """Local path of a file of the adapter, downloaded if it is on the Hub; raises one of `HUB_ERRORS`."""
        return str(self.folder / filename) if self.folder is not None else self._download(filename)

    def read(self, filename: str, path: str, read: Callable[[str], T]) -> T:
        """What `read` makes of a file at its local path; where it raises a `ValueError`, the file is downloaded anew.

        huggingface_hub keeps a file that was damaged on the way, and would give it out forever.
        """
        try:
            return read(path)
        except ValueError:
            if self.folder is not None or self.local_files_only or constants.HF_HUB_OFFLINE:
                raise
            try:
                fresh = self._download(filename, force_download=True)
            except READ_ERRORS:
                fresh = None
            if fresh is None:
                raise
        return read(fresh)

    def _download(self, filename: str, **options: Any) -> str:
        return retried(
            hf_hub_download,
            self.repo_id,
            filename,
            subfolder=self.subfolder,
            revision=self.commit or self.revision,
            token=self.token,
            cache_dir=self.cache_dir,
            local_files_only=self.local_files_only,
            **options,
        )

    def pictures(self) -> Location:
        """The pictures' folder of the library that the place is a part of."""
        if self.folder is not None:
            return replace(self, folder=self.folder.parent.parent / PICTURES_FOLDER)
        root = self.subfolder.removesuffix(f"{EXPERTS_FOLDER}/{self.name}")
        return replace(self, subfolder=f"{root}{PICTURES_FOLDER}")

    def pinned_by(self, path: str) -> Location:
        """This place at the commit that a file of it was downloaded from, so that all files are of one commit."""
        parts = Path(path).parts  # .../models--user--repo/snapshots/<commit>/...
        commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts else None
        return replace(self, commit=commit)


def reason_of(error: Exception) -> str:
    """The message of one of `HUB_ERRORS`; of a file that could not be asked for also why."""
    is_cache = isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None
    return f"{error} ({error.__cause__})" if is_cache else str(error)


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
    if (folder / MANIFEST_NAME).is_file():
        manifest = read_manifest(str(folder / MANIFEST_NAME), text)
        return [
            Location(folder=folder / EXPERTS_FOLDER / record.name, name=record.name, manifest=manifest)
            for record in manifest.experts
        ]
    if (folder / PEFT_ARROW_ROUTER / CONFIG_NAME).is_file():
        return [Location(folder=folder / task, name=task) for task in _task_order(os.listdir(folder))]
    inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
    hint = f" Its subfolders are adapters, which are listed one by one: {', '.join(inner[:3])} ..." if inner else ""
    raise ValueError(
        f"adapter {text!r}: the folder {str(folder)!r} holds no {CONFIG_NAME} and no {MANIFEST_NAME}.{hint}"
    )


def read_manifest(path: str, where: str) -> Manifest:
    """Read a `library.json`.

    Raises:
        ValueError: it cannot be read, or a field of it is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"library {where!r}: {MANIFEST_NAME} cannot be read: {error}") from error
    return Manifest.from_json(text, where)


def hub_place(text: str, subfolder: str | None, hub: dict[str, Any]) -> Location:
    """Take a Hub reference apart; the Hub is not asked.

    Raises:
        ValueError: the text is no Hub reference.
    """
    reference, _, revision = text.partition("@")
    parts = [part for part in reference.split("/") if part]
    if len(parts) < 2:
        raise ValueError(
            f"adapter {text!r}: there is no such folder, and a Hub id has the form 'user/repo' or 'user/repo/folder'."
        )
    inner = "/".join([*parts[2:], *([subfolder] if subfolder else [])]) or None
    place = Location(**{**hub, "repo_id": "/".join(parts[:2]), "subfolder": inner})
    return replace(place, revision=revision) if revision else place


def _locate_on_hub(text: str, subfolder: str | None, hub: dict[str, Any]) -> list[Location]:
    place = hub_place(text, subfolder, hub)
    for filename in (CONFIG_NAME, MANIFEST_NAME):
        try:
            path = place.file(filename)
        except HUB_ERRORS as error:
            # not in the cache and the Hub not asked is an EntryNotFoundError too, but says nothing of the repository
            is_cache = isinstance(error, LocalEntryNotFoundError)
            if isinstance(error, EntryNotFoundError) and (not is_cache or filename == CONFIG_NAME):
                reason = error
                continue
            raise ValueError(
                f"adapter {text!r}: there is no such folder, and the Hub answered: {reason_of(error)}"
            ) from error
        place = place.pinned_by(path)
        return [place] if filename == CONFIG_NAME else _experts(text, place, path)
    return _locate_arrow_repo(text, place, reason)


def _experts(text: str, place: Location, path: str) -> list[Location]:
    prefix = f"{place.subfolder}/" if place.subfolder else ""
    manifest = place.read(MANIFEST_NAME, path, lambda path: read_manifest(path, text))
    return [
        replace(place, subfolder=f"{prefix}{EXPERTS_FOLDER}/{record.name}", name=record.name, manifest=manifest)
        for record in manifest.experts
    ]


def _locate_arrow_repo(text: str, place: Location, error: Exception) -> list[Location]:
    prefix = f"{place.subfolder}/" if place.subfolder else ""
    try:
        files = HfApi(token=place.token).list_repo_files(place.repo_id, revision=place.revision)
    except HUB_ERRORS as listing:
        raise ValueError(f"adapter {text!r}: there is no such folder, and the Hub answered: {listing}") from listing
    if f"{prefix}{PEFT_ARROW_ROUTER}/{CONFIG_NAME}" in files:
        folders = {file[len(prefix) :].split("/")[0] for file in files if file.startswith(prefix)}
        return [replace(place, subfolder=prefix + task, name=task) for task in _task_order(folders)]
    raise ValueError(
        f"adapter {text!r}: there is no such folder, and the Hub repository {place.repo_id!r} holds no "
        f"{prefix}{CONFIG_NAME} and no {prefix}{MANIFEST_NAME} ({error})"
    ) from error


def _task_order(names) -> list[str]:
    """The `task_i` folders that PEFT's `create_arrow_model` writes, by number."""
    numbers = [name.removeprefix("task_") for name in names if name.startswith("task_")]
    return [f"task_{number}" for number in sorted((n for n in numbers if n.isdecimal()), key=int)]
