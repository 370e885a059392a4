"""Vetting one adapter: config, card, header and, where asked for, weights become one report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from .adapter import Adapter
from .base_shapes import BaseShapes
from .files import WEIGHTS_NAME, TensorHeader, WeightsFile, module_ranks, read_config, read_origin
from .lora import KEY_PREFIX
from .manifest import Origin
from .reading import READ_ERRORS, Location
from .report import AdapterReport, Finding
from .serving import vllm_notes
from .vetting_base import check_base, check_copies
from .vetting_checks import (
    Findings,
    check_extras,
    check_files,
    check_license,
    licence_of,
    number,
    sentence,
    unreadable_weights,
)
from .vetting_places import Place
from .vetting_weights import check_weights, saved_is_finite


ITEM_BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "U16": 16,
}


@dataclass(frozen=True)
class Options:
    """What `vet_adapters` was asked for: the licences allowed, and whether to read weights (None: of folders)."""

    licenses: tuple[str, ...] | None = None
    weights: bool | None = None


def vet_place(
    name: str, place: Place, shapes: BaseShapes | None, options: Options
) -> tuple[AdapterReport, Adapter | None]:
    """The report, and the adapter where its weights were read and can be compared with others.

    Args:
        name (`str`): the expert name.
        place: where it lies, the adapter itself, or the report of a reference that leads nowhere.
        shapes (`BaseShapes`, *optional*): of the base model.
        options (`Options`): what was asked for.
    """
    if isinstance(place, AdapterReport):
        return replace(place, name=name), None
    source = place.source if isinstance(place, Adapter) else place.describe()
    owners = (repr(source), f"{name!r} ({source})")
    try:
        origin = place.origin if isinstance(place, Adapter) else read_origin(place)
        config = place.config if isinstance(place, Adapter) else read_config(place)
    except READ_ERRORS as error:
        finding = Finding(
            "damaged_config", f"{sentence(error, *owners)} Leave it out, or ask its author for a whole one."
        )
        return AdapterReport(name, source, problems=(finding,)), None
    is_remote = isinstance(place, Location) and place.folder is None
    read = not is_remote if options.weights is None else options.weights
    adapter = replace(place, name=name) if isinstance(place, Adapter) else None
    adapter = adapter or Adapter(name, config, WeightsFile(place), source, origin)
    return _judge(adapter, origin, shapes, options, read)


def _judge(
    adapter: Adapter, origin: Origin, shapes: BaseShapes | None, options: Options, read: bool
) -> tuple[AdapterReport, Adapter | None]:
    findings, header, statistics = Findings(), {}, None
    owners = (repr(adapter.source), f"{adapter.name!r} ({adapter.source})")
    content = None
    try:
        header = _header(adapter)
        content = check_files(adapter, header, findings)
    except READ_ERRORS as error:
        findings.problems.append(unreadable_weights(error, *owners))
    check_base(content, adapter, shapes, findings)
    keys = {key.removeprefix(KEY_PREFIX): key for key in header}
    if content is not None and read:
        try:
            statistics = check_weights(adapter, findings)
            saved_is_finite(content, adapter, keys, findings)
        except READ_ERRORS as error:
            findings.problems.append(unreadable_weights(error, *owners))
    if content is not None:
        check_copies(content, adapter, keys if read else {}, shapes, findings)
        check_extras(content, adapter, findings)
    licence = licence_of(origin.license)
    check_license(origin.license, options.licenses, findings, licence)
    report = _report(adapter, header, origin, licence)
    notes = vllm_notes(adapter.config, {key: entry.shape for key, entry in header.items()}) if content else []
    report = replace(
        report,
        problems=tuple(findings.problems),
        warnings=tuple(findings.warnings),
        notes=tuple(Finding("vllm", note) for note in notes),
        weights_read=read and content is not None,
        statistics=statistics,
    )
    return report, adapter if statistics else None


def _header(adapter: Adapter) -> dict[str, TensorHeader]:
    if isinstance(adapter.tensors, WeightsFile):
        return adapter.tensors.header()
    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    return {
        key: TensorHeader(names.get(tensor.dtype, "U8"), tuple(tensor.shape))
        for key, tensor in adapter.tensors.items()
    }


def _report(
    adapter: Adapter, header: Mapping[str, TensorHeader], origin: Origin, licence: str | None
) -> AdapterReport:
    ranks = module_ranks(header)
    targets = adapter.config.get("target_modules")
    modules = ranks or ([name for name in targets if isinstance(name, str)] if isinstance(targets, list) else [])
    named, task = adapter.config.get("base_model_name_or_path"), adapter.task_type
    return AdapterReport(
        adapter.name,
        adapter.source,
        rank=max(ranks.values(), default=None),
        ranks=tuple(sorted(set(ranks.values()))),
        alpha=number(adapter.config.get("lora_alpha")),
        target_modules=tuple(sorted({module.rpartition(".")[2] for module in modules})),
        license=licence,
        size=_size(adapter, header),
        parameters=sum(math.prod(entry.shape) for entry in header.values()) if header else None,
        base_model=named if isinstance(named, str) else None,
        commit=origin.commit,
        datasets=origin.datasets,
        task_type=task,
    )


def _size(adapter: Adapter, header: Mapping[str, TensorHeader]) -> int | None:
    place = adapter.tensors.place if isinstance(adapter.tensors, WeightsFile) else None
    if place is not None and place.folder is not None:
        path = place.folder / WEIGHTS_NAME
        return path.stat().st_size if path.is_file() else None
    return (
        sum(math.prod(entry.shape) * ITEM_BITS.get(entry.dtype, 8) // 8 for entry in header.values())
        if header
        else None
    )
