"""Learn about adapters before using them: from config and header alone where possible, and never by an exception."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

import torch
from tqdm.contrib.concurrent import thread_map

from .adapter import HUB_THREADS, Adapter, AdapterLike, AdapterRef
from .base_ids import normalise_base
from .base_shapes import BaseShapes
from .delta import delta_products, near_duplicates
from .reading import Location
from .report import AdapterReport, AdapterReports
from .spectrum import FEWEST_ADAPTERS, find_outliers
from .vetting_adapter import Options, vet_place
from .vetting_places import look_up, named_base


NAMED_BASE: Final = "the base model that most of the adapters name"


def vet_adapter(
    ref: AdapterLike,
    base: Any,
    *,
    licenses: Collection[str] | None = None,
    weights: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
) -> AdapterReport:
    """Look at one adapter: what it is, whether it fits the base, what speaks against it. A bad adapter raises nothing.

    Of the Hub only `adapter_config.json`, the card and the header of the weights are read, unless `weights=True`.

    Args:
        ref: a folder, a Hub id, a `Path`, an `AdapterRef` or an `Adapter`.
        base (`nn.Module`, `str`, `PathLike`, `BaseShapes` or None):
            the base model, or its Hub id or folder, of which only the config is read. None: nothing is said about
            fitting a base.
        licenses (`Collection[str]`, *optional*): the licences allowed, such as `["apache-2.0", "mit"]`; others, and a
            missing one (unless "unknown" is in the list), are a problem. Without a list, missing and unknown ones are
            a warning.
        weights (`bool`, *optional*): read the weights, to find NaN, Inf and a zero update. By default those of folders
            and of memory are read, those of the Hub are not.
        token, revision, cache_dir, local_files_only: of the adapter on the Hub; `@revision` in the reference wins.

    Returns:
        `AdapterReport`: `.ok`, `.problems`, `.warnings` and what is known of the adapter.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: the reference is a library of several adapters; `vet_adapters` takes those.
    """
    options = {"token": token, "revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
    reports = vet_adapters([ref], base, licenses=licenses, weights=weights, **options)
    if len(reports) != 1:
        raise ValueError(f"ref={str(ref)!r} is a library of {len(reports)} adapters; vet_adapters takes those.")
    return reports[0]


def vet_adapters(
    refs: AdapterLike | Mapping[str, AdapterLike] | Iterable[AdapterLike],
    base: Any = NAMED_BASE,
    *,
    licenses: Collection[str] | None = None,
    weights: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
) -> AdapterReports:
    """Look at many adapters, each by itself, and compare those whose weights were read: near-duplicates and outliers.

    Args:
        refs: references as `AdapterLibrary.from_pretrained` takes them; also a folder whose subfolders hold adapters.
        base: as in `vet_adapter`; by default the base model that most of the adapters name.
        licenses, weights, token, revision, cache_dir, local_files_only: as in `vet_adapter`.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: a given name is not allowed.
    """
    defaults = AdapterRef("", None, revision, token, cache_dir, local_files_only)
    if isinstance(licenses, str):
        raise TypeError(f"licenses={licenses!r} is a string; pass a list, such as [{licenses!r}].")
    options = Options(None if licenses is None else tuple(licenses), weights)
    found = look_up(refs, defaults)
    if base is NAMED_BASE:
        base = named_base(place for _, place in found)
    hub = {"cache_dir": cache_dir, "local_files_only": local_files_only}
    shapes = None if base is None else BaseShapes.of(base, **hub)
    remote = any(isinstance(place, Location) and place.folder is None for _, place in found)
    vetted = thread_map(
        lambda pair: vet_place(*pair, shapes, options),
        found,
        max_workers=HUB_THREADS if remote else 1,
        desc="Looking at adapters",
        disable=len(found) < 20,
        leave=False,
    )
    return _compared([report for report, _ in vetted], [adapter for _, adapter in vetted], shapes)


def _compared(
    reports: list[AdapterReport], adapters: list[Adapter | None], shapes: BaseShapes | None
) -> AdapterReports:
    """The reports, with what only shows when the adapters whose weights were read are compared."""
    known = [adapter for adapter in adapters if adapter is not None]
    duplicates, remarks = (), []
    if len(known) > 1:
        names = [adapter.name for adapter in known]
        duplicates = near_duplicates(names, delta_products(known, dtype=torch.float32))
    unread = [report.name for report in reports if not report.weights_read and not report.problems]
    if unread:
        remarks.append(
            f"Of {len(unread)} adapter{'s' if len(unread) > 1 else ''} only config and header were read: NaN, zero "
            "updates, near-duplicates and unusual weights do not show in them. Reading the weights too (--weights, "
            "weights=True) tells."
        )
    usable = {report.name: report.statistics for report in reports if report.statistics and report.ok}
    if 1 < len(usable) < FEWEST_ADAPTERS:
        remarks.append(
            f"Unusual weights were not looked for: that needs the weights of at least {FEWEST_ADAPTERS} usable "
            f"adapters to compare, and here are {len(usable)}."
        )
    base = None if shapes is None else normalise_base(shapes.name) or shapes.name or "the model given"
    return AdapterReports(reports, base, duplicates, find_outliers(usable), tuple(remarks))
