"""A library: named adapters of one base model, in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from tqdm.contrib.concurrent import thread_map

from .adapter import HUB_THREADS, Adapter, AdapterLike, AdapterRef, list_locations, load
from .base_names import check_base, common_base
from .discovery import discover
from .hub import push_library
from .lora_config import check_kind
from .manifest import MANIFEST_NAME, Evaluation, Manifest, Notes, Picture, check_picture_name
from .names import check_name, unique_name
from .reading import Location
from .report import AdapterReports
from .storage import save


class AdapterLibrary(Mapping[str, Adapter]):
    """Adapters of one base model, by name and in order. It never changes: operations return new libraries.

    Args:
        adapters (`Mapping[str, Adapter]` or iterable of `Adapter`): the experts; a mapping gives the names.
        base_model (`str`, *optional*):
            Hub id or folder of the base model; by default what the adapters' configs name. Where it is given it wins
            over the configs, whose names are then replaced on saving.
        notes (`Notes`): description, how it was made, evaluation, pictures.
        pictures (`Mapping[str, Location]`): where the files of `notes.pictures` lie.

    Raises:
        ValueError: no adapters, a name outside the rule, an adapter that is no plain LoRA, or different base models.
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter] | Iterable[Adapter],
        base_model: str | None = None,
        *,
        notes: Notes | None = None,
        pictures: Mapping[str, Location] | None = None,
    ) -> None:
        named = adapters if isinstance(adapters, Mapping) else _by_name(adapters)
        self._adapters = {check_name(name): replace(adapter, name=name) for name, adapter in named.items()}
        if not self._adapters:
            raise ValueError("adapters is empty; a library has at least one.")
        for adapter in self._adapters.values():
            check_kind(adapter.name, adapter.source, adapter.config)
        self.base_model_name_or_path = base_model or common_base(self._adapters.values())
        self.notes = notes or Notes()
        self._pictures = dict(pictures or {})

    @classmethod
    def from_pretrained(
        cls,
        refs: AdapterLike | Mapping[str, AdapterLike] | Iterable[AdapterLike],
        base_model: str | None = None,
        *,
        token: str | bool | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
    ) -> AdapterLibrary:
        """Look adapters up, in folders and on the Hub, and make a library of them; weights are read later.

        References to the Hub are pinned: all files come from the commit that the revision is now.

        Args:
            refs: a reference to a library, a list of references, or a dict name -> reference.
            base_model (`str`, *optional*): the base model, where the adapters name none or different ones.
            token, revision, cache_dir, local_files_only: for the Hub; `@revision` in a reference wins.

        Raises:
            ValueError: nothing readable is there, or the adapters do not go together.
        """
        defaults = AdapterRef("", None, revision, token, cache_dir, local_files_only)
        places = list_locations(refs, defaults)
        adapters = _load_all(places)
        manifest = _manifest_of(places)
        if manifest is None:
            return cls(adapters, base_model)
        if base_model is None:
            check_base(manifest.base_model, adapters.values(), MANIFEST_NAME)
        folder = next(iter(places.values())).pictures()
        pictures = {picture.file: folder for picture in manifest.notes.pictures}
        return cls(adapters, base_model or manifest.base_model, notes=manifest.notes, pictures=pictures)

    def __getitem__(self, name: str) -> Adapter:
        return self._adapters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    def __repr__(self) -> str:
        return f"AdapterLibrary({list(self)}, base_model={self.base_model_name_or_path!r})"

    def select(self, names: Iterable[str]) -> AdapterLibrary:
        """The library of these experts, in this order, without evaluation and pictures: they were of the whole."""
        wanted = [names] if isinstance(names, str) else list(names)
        self._check_known("names", wanted)
        if len(set(wanted)) != len(wanted):
            raise ValueError(f"names={wanted} holds a name twice.")
        return self._with({name: self[name] for name in wanted})

    def without(self, names: Iterable[str]) -> AdapterLibrary:
        """The library without these experts, and without evaluation and pictures: they were of the whole."""
        unwanted = [names] if isinstance(names, str) else list(names)
        self._check_known("names", unwanted)
        return self._with({name: adapter for name, adapter in self.items() if name not in unwanted})

    def rename(self, names: Mapping[str, str]) -> AdapterLibrary:
        """The library with experts renamed, in the same order.

        Args:
            names (`Mapping[str, str]`): old name -> new name.

        Raises:
            ValueError: an old name is unknown, or a new one is not allowed or taken.
        """
        self._check_known("names", list(names))
        renamed = [names.get(name, name) for name in self]
        if len(set(renamed)) != len(renamed):
            raise ValueError(f"names={dict(names)} makes a name double; the names would be {renamed}.")
        adapters = dict(zip(renamed, self.values(), strict=True))
        return AdapterLibrary(adapters, self.base_model_name_or_path, notes=self.notes, pictures=self._pictures)

    def add(
        self,
        refs: AdapterLike | Mapping[str, AdapterLike] | Iterable[AdapterLike],
        *,
        token: str | bool | None = None,
        revision: str | None = None,
    ) -> AdapterLibrary:
        """The library with more adapters behind its own; a derived name that is taken gets `-2`.

        Args:
            refs: as in `from_pretrained`; a single reference too.
            token, revision: for the Hub.

        Raises:
            ValueError: nothing readable is there, a name is taken, or the base model is another one.
        """
        if isinstance(refs, (str, PathLike, AdapterRef, Adapter)):
            refs = [refs]
        added = _load_all(list_locations(refs, AdapterRef("", None, revision, token)))
        check_base(self.base_model_name_or_path, added.values(), "the library")
        adapters = dict(self)
        for name, adapter in added.items():
            if isinstance(refs, Mapping) and name in adapters:
                raise ValueError(f"name {name!r} is already in the library, which holds {list(self)}.")
            adapters[unique_name(name, adapters)] = adapter
        return self._with(adapters)

    def describe(
        self,
        description: str | None = None,
        *,
        made: Mapping[str, Any] | None = None,
        evaluation: Iterable[Evaluation] | None = None,
        pictures: Mapping[str | PathLike, str] | None = None,
    ) -> AdapterLibrary:
        """The library with notes for its card; what is not given stays.

        Args:
            description (`str`, *optional*): plain text; Markdown in it is shown, not interpreted.
            made (`Mapping[str, Any]`, *optional*): how it was made: `command`, `versions`, `seeds` ...
            evaluation (iterable of `Evaluation`, *optional*): measured figures.
            pictures (`Mapping`, *optional*): file -> caption; .png, .svg or .jpg.

        Raises:
            ValueError: a picture is missing or of another kind.
        """
        notes, places = self.notes, dict(self._pictures)
        if description is not None:
            notes = replace(notes, description=description)
        if made is not None:
            notes = replace(notes, made=dict(made))
        if evaluation is not None:
            notes = replace(notes, evaluation=tuple(evaluation))
        if pictures is not None:
            found = [_picture(Path(file), caption) for file, caption in pictures.items()]
            notes = replace(notes, pictures=tuple(picture for picture, _ in found))
            places = {picture.file: place for picture, place in found}
        return AdapterLibrary(self, self.base_model_name_or_path, notes=notes, pictures=places)

    def save_pretrained(self, folder: str | PathLike) -> Manifest:
        """Write `library.json`, `README.md` and `experts/<name>/`, plain PEFT adapters; download what is on the Hub.

        The folder is replaced whole and in one step: after a kill it is the old library or the new one, and the next
        run succeeds. Other files of an old library's folder are kept.

        Args:
            folder (`str` or `PathLike`): a new or empty folder, or that of a library.

        Raises:
            ValueError: the folder holds something else, or an adapter's file is missing, damaged or a pickle.
        """
        return save(self, folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Save the library and upload it as one commit, with its card; see [`peft_arrow.library.hub.push_library`]."""
        return push_library(
            self,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )

    @staticmethod
    def discover(base_model: str, **filters: Any) -> AdapterReports:
        """Adapters of a base model on the Hub, with their reports; see [`peft_arrow.library.discovery.discover`]."""
        return discover(base_model, **filters)

    def picture(self, file: str) -> str:
        """Local path of one of `notes.pictures`, downloaded if it is on the Hub."""
        return self._pictures[file].file(file)

    def _with(self, adapters: Mapping[str, Adapter]) -> AdapterLibrary:
        notes = replace(self.notes, evaluation=(), pictures=())
        return AdapterLibrary(adapters, self.base_model_name_or_path, notes=notes)

    def _check_known(self, argument: str, names: list[str]) -> None:
        unknown = [name for name in names if name not in self]
        if unknown:
            raise ValueError(f"{argument} holds {unknown[0]!r}, which is not in the library; it holds {list(self)}.")


def _by_name(adapters: Iterable[Adapter]) -> dict[str, Adapter]:
    named: dict[str, Adapter] = {}
    for adapter in adapters:
        named[unique_name(check_name(adapter.name), named)] = adapter
    return named


def _load_all(places: Mapping[str, Adapter | Location]) -> dict[str, Adapter]:
    loaded = thread_map(
        lambda item: load(*item, with_origin=True),
        places.items(),
        max_workers=HUB_THREADS,
        desc="Reading configs",
        disable=len(places) < 20,
        leave=False,
    )
    return {adapter.name: adapter for adapter in loaded}


def _manifest_of(places: Mapping[str, Adapter | Location]) -> Manifest | None:
    """The `library.json` of the places, where they are one library and the whole of it."""
    manifests = [place.manifest if isinstance(place, Location) else None for place in places.values()]
    first = manifests[0]
    is_one = first is not None and len(places) == len(first.experts)
    return first if is_one and all(manifest is first for manifest in manifests) else None


def _picture(path: Path, caption: str) -> tuple[Picture, Location]:
    if not path.is_file():
        raise ValueError(f"pictures holds {str(path)!r}, which is no file.")
    return Picture(check_picture_name(path.name), caption), Location(folder=path.parent)
