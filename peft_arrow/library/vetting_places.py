"""Find the adapters to be vetted, each by itself: where nothing readable is, a report says so and the others go on."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from tqdm.contrib.concurrent import thread_map

from .adapter import HUB_THREADS, Adapter, AdapterLike, AdapterRef, config_of, list_locations
from .base_ids import is_local_path, normalise_base
from .files import PICKLE_NAME, WEIGHTS_NAME
from .manifest import MANIFEST_NAME
from .names import check_name, slug, unique_name
from .reading import CONFIG_NAME, PEFT_ARROW_ROUTER, READ_ERRORS, Location
from .report import AdapterReport, Finding
from .vetting_checks import sentence


Place = Adapter | Location | AdapterReport


def look_up(
    refs: AdapterLike | Mapping[str, AdapterLike] | Iterable[AdapterLike], defaults: AdapterRef
) -> list[tuple[str, Place]]:
    """(name, place) of every adapter, or a report where a reference leads to nothing; several are looked up at a time.

    Args:
        refs: references as `list_locations` takes them; also a single one, or a folder whose subfolders hold adapters.
        defaults (`AdapterRef`): token, revision and cache settings for references that bring none.

    Raises:
        TypeError: `refs` is neither a mapping nor an iterable of references.
        ValueError: a given name is not allowed.
    """
    if isinstance(refs, (str, PathLike, AdapterRef, Adapter, Location)):
        refs = [refs]
    if isinstance(refs, Mapping):
        asked = [(check_name(name), reference) for name, reference in refs.items()]
    elif isinstance(refs, Iterable):
        asked = [(None, reference) for given in refs for reference in _subfolders(given)]
    else:
        raise TypeError(f"refs={refs!r} is not allowed; pass a list of references or a dict of names.")
    groups = thread_map(
        lambda pair: _find(*pair, defaults),
        asked,
        max_workers=HUB_THREADS,
        desc="Looking up adapters",
        disable=len(asked) < 20,
        leave=False,
    )
    found: dict[str, Place] = {}
    for name, place in (pair for group in groups for pair in group):
        found[unique_name(name, found)] = place
    return list(found.items())


def _find(name: str | None, reference: Any, defaults: AdapterRef) -> list[tuple[str, Place]]:
    try:
        return list(list_locations([reference] if name is None else {name: reference}, defaults).items())
    except READ_ERRORS as error:
        source = reference.source if isinstance(reference, AdapterRef) else reference
        text = os.fspath(source) if isinstance(source, (str, PathLike)) else "library"
        advice = "Complete it or leave it out." if Path(text).expanduser().is_dir() else "Check how it is written."
        finding = Finding("not_found", f"{sentence(error, repr(text)).rstrip('.')}. {advice}")
        derived = slug(text.partition("@")[0].rstrip("/").split("/")[-1])
        return [(name or derived, AdapterReport("", text, problems=(finding,)))]


def _subfolders(reference: Any) -> list[Any]:
    """The reference; of a folder that is no adapter and no library, those of its subfolders that hold an adapter."""
    if not isinstance(reference, (str, PathLike)):
        return [reference]
    folder = Path(reference).expanduser()
    own = (CONFIG_NAME, MANIFEST_NAME, PEFT_ARROW_ROUTER)
    if not folder.is_dir() or any((folder / name).exists() for name in own):
        return [reference]
    files = (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME)
    inner = [path for path in sorted(folder.iterdir()) if any((path / name).is_file() for name in files)]
    return inner or [reference]


def named_base(places: Iterable[Place]) -> str | None:
    """The base model that most of the adapters name, as a Hub id where one gives it so; None where none names one."""
    names = []
    for place in places:
        if not isinstance(place, AdapterReport):
            try:
                names.append(config_of(place).get("base_model_name_or_path"))
            except READ_ERRORS:
                continue
    known = {name: normalise_base(name).casefold() for name in names if normalise_base(name)}
    if not known:
        return None
    counts = Counter(known[name] for name in names if isinstance(name, str) and name in known)
    most = counts.most_common(1)[0][0]
    same = [name for name, normal in known.items() if normal == most]
    return next((name for name in same if not is_local_path(name)), same[0])
