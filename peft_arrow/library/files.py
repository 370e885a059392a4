"""What lies in an adapter's folder: its config, and its weights, read only when they are asked for."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import ItemsView, Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import HfApi, metadata_load
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from safetensors import SafetensorError, safe_open

from .fields import parse_json
from .manifest import Origin
from .reading import CONFIG_NAME, HUB_ERRORS, READ_ERRORS, Location, reason_of
from .retrying import retried


WEIGHTS_NAME = "adapter_model.safetensors"
A_SUFFIX = ".lora_A.weight"
PICKLE_NAME = "adapter_model.bin"
CARD_NAME = "README.md"


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor: its `dtype` as safetensors writes it (`F32`), and its `shape`."""

    dtype: str
    shape: tuple[int, ...]


def read_config(place: Location) -> Mapping[str, Any]:
    """The content of `adapter_config.json`.

    Raises:
        ValueError: the file is missing or is not a JSON object.
    """
    where = f"adapter {place.describe()!r}: {CONFIG_NAME}"
    try:
        return place.read(
            CONFIG_NAME,
            place.file(CONFIG_NAME),
            lambda path: parse_json(Path(path).read_text(encoding="utf-8"), where),
        )
    except (*HUB_ERRORS, UnicodeDecodeError) as error:
        raise ValueError(f"{where} cannot be read: {reason_of(error)}") from error


class WeightsFile(Mapping[str, torch.Tensor]):
    """The tensors of an `adapter_model.safetensors`, by key; each access reads from disk, nothing is kept.

    The file is downloaded at the first access. Where the library's `library.json` states its sha256, the file is
    compared with it once. A damaged file of the Hub's cache is downloaded once more.

    Args:
        place (`Location`): the adapter's place.

    Raises:
        ValueError: at an access: the file is missing, damaged, not the one that `library.json` states, or a pickle.
    """

    def __init__(self, place: Location) -> None:
        self.place = place
        self._path: str | None = None

    def path(self) -> str:
        """Local path of the file, checked against the sha256 of `library.json` where there is one."""
        if self._path is None:
            self._path = self.place.read(WEIGHTS_NAME, self._find(), self._checked)
        return self._path

    def header(self) -> dict[str, TensorHeader]:
        """Shapes and dtypes by key, without reading a weight; of the Hub only the file's first bytes are asked for."""
        if self._path is None and self.place.folder is None and not self.place.local_files_only:
            return _remote_header(self.place)
        return local_header(self.path(), self.place.describe())

    def items(self) -> ItemsView[str, torch.Tensor]:
        """All tensors, with the file opened once."""
        with self._open() as file:
            return {key: file.get_tensor(key) for key in file.keys()}.items()  # noqa: SIM118

    def __getitem__(self, key: str) -> torch.Tensor:
        with self._open() as file:
            if key not in file.keys():  # noqa: SIM118
                raise KeyError(key)
            return file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        with self._open() as file:
            return iter(list(file.keys()))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __repr__(self) -> str:
        return f"WeightsFile({self.place.describe()!r})"

    def copy_to(self, path: str | PathLike) -> str:
        """Copy the file and return the sha256 of the copy, which is the one of `library.json` where there is one."""

        def copy(found: str) -> str:
            shutil.copyfile(found, path)
            self._check_header(path)
            return self._checked_sum(path)

        return self.place.read(WEIGHTS_NAME, self._path or self._find(), copy)

    def move_to(self, place: Location) -> None:
        """Read from another place from now on, which holds the same file."""
        self.place, self._path = place, None

    def _open(self):
        return _open(self.path(), self.place.describe())

    def _checked(self, path: str) -> str:
        if self.place.record is None:
            self._check_header(path)
        else:
            self._checked_sum(path)
        return path

    def _check_header(self, path: str | PathLike) -> None:
        with _open(path, self.place.describe()):
            pass

    def _checked_sum(self, path: str | PathLike) -> str:
        found, record = sha256_of(path), self.place.record
        if record is not None and found != record.sha256:
            raise ValueError(
                f"adapter {self.place.describe()!r}: {WEIGHTS_NAME} has the sha256 {found}, and library.json says "
                f"{record.sha256}; the file was changed or damaged."
            )
        return found

    def _find(self) -> str:
        try:
            path = self.place.file(WEIGHTS_NAME)
            if not os.path.isfile(path):
                raise FileNotFoundError(f"there is no file {path}")
        except HUB_ERRORS as error:
            raise ValueError(f"adapter {self.place.describe()!r}: {_why_no_weights(self.place, error)}") from error
        return path


def module_ranks(header: Mapping[str, TensorHeader]) -> dict[str, int]:
    """The rank of each module that a header has a lora_A of, by the key without its end."""
    return {
        key.removesuffix(A_SUFFIX): entry.shape[0]
        for key, entry in header.items()
        if key.endswith(A_SUFFIX) and entry.shape
    }


def local_header(path: str, where: str) -> dict[str, TensorHeader]:
    """Shapes and dtypes by key of a safetensors file; `where` is for the message of the `ValueError`."""
    with _open(path, where) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {key: TensorHeader(part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}


def _open(path: str, where: str):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"adapter {where!r}: {WEIGHTS_NAME} is damaged: {error}") from error


def sha256_of(path: str | PathLike) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remote_header(place: Location) -> dict[str, TensorHeader]:
    filename = f"{place.subfolder}/{WEIGHTS_NAME}" if place.subfolder else WEIGHTS_NAME
    try:
        api = HfApi(token=place.token)
        found = retried(
            api.parse_safetensors_file_metadata, place.repo_id, filename, revision=place.commit or place.revision
        )
    except (SafetensorsParsingError, NotASafetensorsRepoError) as error:
        raise ValueError(f"adapter {place.describe()!r}: {WEIGHTS_NAME} is damaged: {error}") from error
    except HUB_ERRORS as error:
        raise ValueError(f"adapter {place.describe()!r}: {_why_no_weights(place, error)}") from error
    return {key: TensorHeader(info.dtype, tuple(info.shape)) for key, info in found.tensors.items()}


def _why_no_weights(place: Location, error: Exception) -> str:
    if has_pickle(place):
        return (
            f"there is only {PICKLE_NAME}, a pickle, which can run code when it is read; load it with PEFT if you "
            f"trust it and save it again, which writes {WEIGHTS_NAME}."
        )
    return f"{WEIGHTS_NAME} cannot be read: {reason_of(error)}"


def has_pickle(place: Location) -> bool:
    """Whether the place holds `adapter_model.bin`; nothing is downloaded."""
    if place.folder is not None:
        return (place.folder / PICKLE_NAME).is_file()
    filename = f"{place.subfolder}/{PICKLE_NAME}" if place.subfolder else PICKLE_NAME
    try:
        return not place.local_files_only and HfApi(token=place.token).file_exists(
            place.repo_id, filename, revision=place.commit or place.revision
        )
    except HUB_ERRORS:
        return False


def read_origin(place: Location) -> Origin:
    """Where the adapter is from and what its card says of its terms; `library.json` wins over the card.

    A card that is missing or unreadable states nothing.
    """
    if place.record is not None:
        return place.record.origin
    source = place.label if place.folder is not None else place.hub_name()
    card = _card_data(place)
    stated, named = card.get("license"), card.get("datasets")
    datasets = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    return Origin(
        source=source,
        commit=place.commit,
        license=stated if isinstance(stated, str) else None,
        datasets=tuple(dataset for dataset in datasets if isinstance(dataset, str)),
    )


def _card_data(place: Location) -> dict[str, Any]:
    """The metadata of the card beside the adapter, or else of the repository's."""
    places = [place] if place.folder is not None or not place.subfolder else [place, replace(place, subfolder=None)]
    for candidate in places:
        try:
            return metadata_load(candidate.file(CARD_NAME)) or {}
        except (*READ_ERRORS, yaml.YAMLError, RecursionError):
            continue
    return {}
