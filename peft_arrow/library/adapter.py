"""One adapter: a reference to a PEFT LoRA checkpoint, and the checkpoint read from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import torch
from peft.utils import get_peft_model_state_dict
from tqdm.contrib.concurrent import thread_map

from .files import WeightsFile, read_config, read_origin
from .manifest import Origin
from .names import check_name, slug, unique_name
from .reading import Location, locate


HUB_THREADS = 8


@dataclass(frozen=True)
class AdapterRef:
    """Where an adapter lies.

    Args:
        source (`str` or `PathLike`):
            A folder with `adapter_config.json`, or a Hub id `user/repo` or `user/repo/sub/folder`, each also with
            `@revision`. A `pathlib.Path` and strings that start with `/`, `./`, `../` or `~` are local; any other
            string is local if such a folder exists.
        subfolder (`str`, *optional*): folder inside the source.
        revision (`str`, *optional*): branch, tag or commit; `@revision` in the source wins over it.
        token (`str` or `bool`, *optional*): Hub token for this adapter.
        cache_dir (`str`, *optional*): where Hub files are kept.
        local_files_only (`bool`): do not ask the Hub, use what is in the cache.
    """

    source: str | PathLike
    subfolder: str | None = None
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | None = None
    local_files_only: bool = False

    def locations(self) -> list[Location]:
        """The adapter's place, or one place per expert where the source is a folder of PEFT's `create_arrow_model`.

        Raises:
            ValueError: nothing readable is there; the message says what was tried.
        """
        return locate(
            self.source,
            subfolder=self.subfolder,
            revision=self.revision,
            token=self.token,
            cache_dir=self.cache_dir,
            local_files_only=self.local_files_only,
        )


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: its config, and its weights in memory or in a file that is read when they are asked for.

    Args:
        name (`str`): the expert name it gets.
        config (`Mapping`): the content of `adapter_config.json`.
        tensors (`Mapping[str, torch.Tensor]`): the content of `adapter_model.safetensors`, keys as PEFT writes them.
        source (`str`): where it is from, for messages.
        origin (`Origin`): where it is from and under which terms, as it may be saved and shared.
    """

    name: str
    config: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    source: str = "memory"
    origin: Origin = Origin()

    @classmethod
    def from_peft_model(cls, model: torch.nn.Module, adapter_name: str = "default", name: str | None = None):
        """Take a LoRA adapter out of a `PeftModel`; its tensors are shared, not copied.

        Args:
            model (`PeftModel`): the model that holds the adapter.
            adapter_name (`str`): its name there.
            name (`str`, *optional*): the expert's name; `adapter_name` by default.
        """
        if adapter_name not in model.peft_config:
            raise ValueError(f"adapter_name={adapter_name!r} is not in the model; it has {list(model.peft_config)}.")
        config = model.peft_config[adapter_name].to_dict()
        config["peft_type"] = str(getattr(config["peft_type"], "value", config["peft_type"]))
        tensors = {
            key: tensor.detach() for key, tensor in get_peft_model_state_dict(model, adapter_name=adapter_name).items()
        }
        return cls(name=check_name(name or adapter_name), config=config, tensors=tensors)

    @property
    def base_model_name_or_path(self) -> str | None:
        """The base model that the adapter's config names."""
        return self.config.get("base_model_name_or_path")

    @property
    def where(self) -> str:
        """The adapter's name and source, for messages."""
        return f"adapter {self.name!r} ({self.source})"

    @property
    def task_type(self) -> str | None:
        """PEFT's task type, such as `"CAUSAL_LM"`, or None."""
        task_type = self.config.get("task_type")
        return str(getattr(task_type, "value", task_type)) if task_type is not None else None


AdapterLike = str | PathLike | AdapterRef | Adapter | Location | Mapping[str, Adapter]


def list_locations(
    adapters: AdapterLike | Mapping[str, AdapterLike] | Iterable[AdapterLike],
    defaults: AdapterRef | None = None,
) -> dict[str, Adapter | Location]:
    """Name every adapter and find where it lies, without reading its weights.

    Args:
        adapters: a mapping name -> reference, or an iterable of references.
        defaults (`AdapterRef`, *optional*): token, revision, cache settings for references that bring none.

    Raises:
        TypeError: the argument is neither a mapping nor an iterable of references.
        ValueError: no adapters, a bad or repeated name, or nothing readable where a reference points.
    """
    if isinstance(adapters, Mapping):
        found = {check_name(name): _one(name, reference, defaults) for name, reference in adapters.items()}
    else:
        if isinstance(adapters, (str, PathLike, AdapterRef, Adapter)):
            adapters = _all_of(adapters, defaults)
        if not isinstance(adapters, Iterable):
            raise TypeError(f"adapters={adapters!r} is not allowed; pass a list of references or a dict of names.")
        found = _with_unique_names(_find_all(list(adapters), defaults))
    if not found:
        raise ValueError("adapters is empty; at least one adapter is needed.")
    return found


def _one(name: str, reference: AdapterLike, defaults: AdapterRef | None) -> Adapter | Location:
    if isinstance(reference, Location):
        return reference
    places = _find(reference, defaults)
    if isinstance(reference, Mapping) or len(places) != 1 or _is_in_library(places[0][1]):
        raise ValueError(
            f"adapters[{name!r}]={reference!r} is a library of {len(places)} adapters; a mapping names one adapter "
            "per entry: pass such a reference in a list."
        )
    return places[0][1]


def _all_of(reference: AdapterLike, defaults: AdapterRef | None) -> list[AdapterLike]:
    places = _find(reference, defaults)
    if len(places) == 1 and not _is_in_library(places[0][1]):
        raise ValueError(
            f"adapters={str(reference)!r} is a single adapter; pass a list of references, such as "
            f"[{str(reference)!r}], or a dict name -> reference."
        )
    return [place for _, place in places]


def _is_in_library(place: Adapter | Location) -> bool:
    return isinstance(place, Location) and place.name is not None


def _find_all(references: list[AdapterLike], defaults: AdapterRef | None) -> list[tuple[str, Adapter | Location]]:
    """Look all references up, several at a time: each on the Hub costs the time of a few requests."""
    found = thread_map(
        lambda reference: _find(reference, defaults),
        references,
        max_workers=HUB_THREADS,
        desc="Looking up adapters",
        disable=len(references) < 20,
        leave=False,
    )
    return [pair for pairs in found for pair in pairs]


def _find(reference: AdapterLike, defaults: AdapterRef | None) -> list[tuple[str, Adapter | Location]]:
    if isinstance(reference, Adapter):
        return [(check_name(reference.name), reference)]
    if isinstance(reference, Location):
        return [(slug(reference.label), reference)]
    if isinstance(reference, Mapping):
        return [pair for name, adapter in reference.items() for pair in _find(replace(adapter, name=name), defaults)]
    if isinstance(reference, (str, PathLike)):
        reference = replace(defaults or AdapterRef(""), source=reference)
    if not isinstance(reference, AdapterRef):
        raise TypeError(
            f"adapters holds {reference!r} of type {type(reference).__name__}; allowed are a folder, a Hub id, a "
            "Path, an AdapterRef and an Adapter."
        )
    return [(slug(place.label), place) for place in reference.locations()]


def _with_unique_names(pairs: list[tuple[str, Adapter | Location]]) -> dict[str, Adapter | Location]:
    found: dict[str, Adapter | Location] = {}
    for name, place in pairs:
        found[unique_name(name, found)] = place
    return found


def config_of(place: Adapter | Location) -> Mapping[str, Any]:
    """The adapter's config, read without its weights."""
    return place.config if isinstance(place, Adapter) else read_config(place)


def source_of(place: Adapter | Location) -> str:
    """Where the adapter is from, as it may be saved with a model."""
    if isinstance(place, Location):
        return place.record.origin.source or place.public_name() if place.record else place.public_name()
    return place.origin.source or place.source


def license_of(place: Adapter | Location) -> str | None:
    """The licence that the adapter's library or card states; of the Hub no card is asked for."""
    if isinstance(place, Adapter):
        return place.origin.license
    is_here = place.record is not None or place.folder is not None
    return read_origin(place).license if is_here else None


def load(name: str, place: Adapter | Location, *, with_origin: bool = False) -> Adapter:
    """The adapter at a place, under that name; its weights are read when they are asked for.

    Args:
        name (`str`): the expert name.
        place (`Adapter` or `Location`): as `list_locations` finds it.
        with_origin (`bool`): read the adapter's card too, for its licence; of the Hub that is a request more.

    Raises:
        ValueError: the config is missing or unreadable.
    """
    if isinstance(place, Adapter):
        return replace(place, name=name)
    origin = read_origin(place) if with_origin or place.record else Origin(source=place.public_name())
    return Adapter(name, read_config(place), WeightsFile(place), place.describe(), origin)


def download(adapters: Iterable[Adapter]) -> None:
    """Download the weights that are on the Hub and not in the cache, several files at a time.

    Raises:
        ValueError: a file is missing or damaged, or there is only a pickle.
    """
    files = [adapter.tensors for adapter in adapters if isinstance(adapter.tensors, WeightsFile)]
    remote = [file for file in files if file.place.folder is None]
    if remote:
        thread_map(WeightsFile.path, remote, max_workers=HUB_THREADS, desc="Downloading adapters", leave=False)


__all__ = [
    "Adapter",
    "AdapterLike",
    "AdapterRef",
    "check_name",
    "config_of",
    "download",
    "license_of",
    "list_locations",
    "load",
    "slug",
    "source_of",
    "unique_name",
]
