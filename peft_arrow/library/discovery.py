"""Adapters of a base model on the Hub: searched by tag, judged by config and header, nothing else downloaded."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.errors import HfHubHTTPError
from tqdm.contrib.concurrent import thread_map

from .adapter import HUB_THREADS, AdapterRef
from .base_ids import is_local_path
from .base_shapes import BaseShapes
from .licenses import is_allowed
from .report import AdapterReport, AdapterReports
from .retrying import retried
from .vetting import vet_adapters


MIRRORS = ("unsloth/{name}", "unsloth/{name}-bnb-4bit", "unsloth/{name}-unsloth-bnb-4bit")


def discover(
    base_model: str,
    *,
    limit: int = 20,
    licenses: Collection[str] | None = None,
    max_rank: int | None = None,
    max_size: int | None = None,
    min_downloads: int | None = None,
    author: str | None = None,
    aliases: Collection[str] = (),
    token: str | bool | None = None,
) -> AdapterReports:
    """Find adapters of a base model on the Hub, for each name of the base the most downloaded first.

    Repositories are found by the tag `base_model:adapter:<id>`, for the base's id, the id it was renamed to, its
    mirrors of other organisations (`MIRRORS`) and `aliases`. Of each adapter only `adapter_config.json`, the card and
    the header of the weights are read.

    Args:
        base_model (`str`): Hub id of the base model.
        limit (`int`): reports at most.
        licenses (`Collection[str]`, *optional*): only these licences, as the Hub writes them (`apache-2.0`).
        max_rank (`int`, *optional*): only adapters with no larger rank.
        max_size (`int`, *optional*): only weights of at most so many bytes.
        min_downloads (`int`, *optional*): only adapters downloaded so often in the last month.
        author (`str`, *optional*): only of this user or organisation.
        aliases (`Collection[str]`): more ids under which adapters name this base.
        token (`str` or `bool`, *optional*): Hub token.

    Returns:
        `AdapterReports`: also of adapters that cannot be used, with the reason.

    Raises:
        ValueError: the base is a folder, or a number is below 1.
        huggingface_hub.errors.HfHubHTTPError: the Hub cannot be asked.
    """
    if is_local_path(base_model):
        raise ValueError(f"base_model={base_model!r} is a folder; adapters are searched by the base's Hub id.")
    for name, value in (("limit", limit), ("max_rank", max_rank), ("max_size", max_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value!r} is not allowed; it is at least 1.")
    wanted = _Wanted(licenses, max_rank, max_size, min_downloads)
    api = HfApi(token=token)
    candidates = _candidates(api, [*_names(api, base_model), *aliases], author, wanted)
    shapes = BaseShapes.of(base_model, token=token)
    found: list[AdapterReport] = []
    while len(found) < limit and (batch := list(islice(candidates, limit - len(found)))):
        found += _vetted(batch, shapes, wanted, token)
    return AdapterReports(found[:limit], base_model)


@dataclass(frozen=True)
class _Wanted:
    """The filters of `discover`."""

    licenses: Collection[str] | None
    max_rank: int | None
    max_size: int | None
    min_downloads: int | None

    def by_listing(self, info: ModelInfo) -> bool:
        """Whether what the listing says is wanted."""
        stated = [tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")]
        is_wanted = self.licenses is None or is_allowed(stated[0] if stated else None, self.licenses)
        return is_wanted and (info.downloads or 0) >= (self.min_downloads or 0)

    def by_report(self, report: AdapterReport) -> bool:
        """Whether what the files say is wanted; what is not known is."""
        pairs = ((report.rank, self.max_rank), (report.size, self.max_size))
        return all(value is None or most is None or value <= most for value, most in pairs)


def _names(api: HfApi, base_model: str) -> list[str]:
    """The ids under which adapters may name the base."""
    names = [base_model]
    try:
        names.append(retried(api.model_info, base_model).id)
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code not in (401, 403, 404):
            raise
    last = names[-1].split("/")[-1]
    return list(dict.fromkeys([*names, *(mirror.format(name=last) for mirror in MIRRORS)]))


def _candidates(api: HfApi, names: list[str], author: str | None, wanted: _Wanted) -> Iterator[ModelInfo]:
    seen = set()
    for name in names:
        for info in api.list_models(filter=f"base_model:adapter:{name}", author=author, sort="downloads"):
            if info.id not in seen and wanted.by_listing(info):
                seen.add(info.id)
                yield info


def _vetted(
    batch: list[ModelInfo], shapes: BaseShapes, wanted: _Wanted, token: str | bool | None
) -> list[AdapterReport]:
    """The wanted reports of some repositories, of which each holds an adapter or a library."""

    def reports_of(info: ModelInfo) -> list[AdapterReport]:
        reports = vet_adapters([AdapterRef(info.id, token=token)], shapes, licenses=wanted.licenses, weights=False)
        return [replace(report, downloads=info.downloads) for report in reports if wanted.by_report(report)]

    found = thread_map(reports_of, batch, max_workers=HUB_THREADS, desc="Reading headers", leave=False)
    return [report for reports in found for report in reports]
