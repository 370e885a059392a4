"""One adapter in the place of several: the truncated SVD of the mean of their updates, without any data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from tqdm import tqdm

from ..library.adapter import Adapter
from ..library.base_names import base_revision
from ..library.delta import MANY, FactorReader
from ..library.library import AdapterLibrary
from ..library.licenses import UNKNOWN, strictest
from ..library.lora import KEY_PREFIX
from ..library.low_rank import truncated
from ..library.manifest import Origin
from ..library.names import check_name
from ..library.versions import framework_versions


# What must be equal for members to have one config, beside the modules.
SHARED_FIELDS = ("fan_in_fan_out", "layer_replication", "task_type")


@dataclass(frozen=True)
class Merged:
    """One adapter made of several.

    Args:
        adapter (`Adapter`): in memory, float32, one rank for all modules, alpha / r = 1.
        lost_norm (`float`): share of the Frobenius norm of the mean update that the rank cut off, 0 to 1.
    """

    adapter: Adapter
    lost_norm: float


def merge_adapters(
    adapters: Mapping[str, Adapter] | Iterable[Adapter],
    weights: Sequence[float] | Mapping[str, float] | None = None,
    rank: int | None = None,
    name: str = "merged",
) -> Merged:
    """The adapter of that rank whose update is closest to sum_i w_i dW_i in Frobenius norm (Eckart and Young 1936).

    Per module the factors are put side by side, and an SVD of the core between two QRs is cut to the rank: delta-W is
    never formed, and one module is in memory at a time. A module that a member lacks counts as zero there. Modules of
    less rank are filled with zeros, because servers such as vLLM read one rank.

    Args:
        adapters: plain LoRA adapters of one base model; a mapping gives the names.
        weights (`Sequence` or `Mapping`, *optional*): w_i, used as given, missing names 0; default 1 / N each.
        rank (`int`, *optional*): default the largest of a module of a member.
        name (`str`): of the result.

    Raises:
        ValueError:
            No adapters, a bad rank or weight, members that also hold whole modules, biases or embeddings, or whose
            modules or configs do not go together.
    """
    members = list(adapters.values() if isinstance(adapters, Mapping) else adapters)
    if not members:
        raise ValueError("adapters is empty; at least one is needed.")
    scales = _scales(members, weights)
    readers = [FactorReader(member) for member in members]
    _check_members(members, readers)
    ranks = [factor.lora_A.shape[0] for reader in readers for factor in reader.outline.factors.values()]
    rank = max(ranks) if rank is None else rank
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank={rank!r} is not allowed; it is a whole number of at least 1.")
    modules = sorted({module for reader in readers for module in reader.outline.factors})
    tensors, kept, lost = {}, 0.0, 0.0
    for module in tqdm(modules, f"Merging {name}", unit="module", leave=False, disable=len(members) < MANY):
        lora_A, lora_B, kept_here, lost_here = truncated(*_side_by_side(readers, module, scales), rank)
        kept, lost = kept + kept_here, lost + lost_here
        missing = rank - lora_A.shape[0]
        tensors[f"{KEY_PREFIX}{module}.lora_A.weight"] = pad(lora_A, (0, 0, 0, missing)).float().contiguous()
        tensors[f"{KEY_PREFIX}{module}.lora_B.weight"] = pad(lora_B, (0, missing)).float().contiguous()
    config = _config(members, rank, modules)
    adapter = Adapter(check_name(name), config, tensors, f"merged from {len(members)} adapters", _origin(members))
    return Merged(adapter, (lost / (kept + lost)) ** 0.5 if kept + lost else 0.0)


def merge_clusters(
    library: AdapterLibrary, clusters: Mapping[str, Sequence[str]], rank: int | None, made: Mapping[str, Any]
) -> tuple[AdapterLibrary, dict[str, float]]:
    """A library of one merged expert a cluster, with notes on how it was made, and each one's lost share of the norm.

    Args:
        library (`AdapterLibrary`): the members.
        clusters (`Mapping`): name of the new expert -> names of its members.
        rank (`int`, *optional*): of every expert; default its largest member's.
        made (`Mapping`): what the notes tell beside the clusters.

    Raises:
        ValueError: a member is not in the library, or members cannot be merged.
    """
    found = {}
    with tqdm(total=len(library), desc="Merging clusters", unit="adapter", disable=len(library) < MANY) as bar:
        for name, members in clusters.items():
            found[name] = merge_adapters(library.select(members), rank=rank, name=name)
            bar.update(len(members))
    lost = {name: merged.lost_norm for name, merged in found.items()}
    merged = AdapterLibrary({name: one.adapter for name, one in found.items()}, library.base_model_name_or_path)
    notes = {
        "command": f"MBCClusterer(...).fit(...).merge_experts(rank={rank})",
        "versions": framework_versions(),
        **made,
        "clusters": {name: list(members) for name, members in clusters.items()},
        "lost_norm": {name: round(value, 4) for name, value in lost.items()},
    }
    text = f"{len(found)} experts, each the mean of a cluster of {len(library)} adapters, without further training."
    return merged.describe(text, made=notes), lost


def _scales(members: Sequence[Adapter], weights: Sequence[float] | Mapping[str, float] | None) -> list[float]:
    if weights is None:
        return [1 / len(members)] * len(members)
    if isinstance(weights, Mapping):
        unknown = [name for name in weights if name not in {member.name for member in members}]
        if unknown:
            raise ValueError(f"weights holds {unknown[0]!r}, which is none of {[member.name for member in members]}.")
        return [float(weights.get(member.name, 0.0)) for member in members]
    if len(weights) != len(members):
        raise ValueError(f"weights has {len(weights)} numbers for {len(members)} adapters; give one each.")
    return [float(weight) for weight in weights]


def _check_members(members: Sequence[Adapter], readers: Sequence[FactorReader]) -> None:
    shapes: dict[str, tuple[int, int]] = {}
    for member, reader in zip(members, readers, strict=True):
        more = [*reader.outline.saved, *reader.outline.copies]
        if more:
            raise ValueError(
                f"{member.where}: it also holds {more[0]}, trained or saved in full; only low-rank updates are merged."
            )
        for field in SHARED_FIELDS:
            ours, first = (_plain(one.config.get(field)) for one in (member, members[0]))
            if ours != first:
                raise ValueError(
                    f"{field} is {ours!r} in {member.name!r} and {first!r} in {members[0].name!r}; adapters are "
                    "merged where it is the same."
                )
        for module, factor in reader.outline.factors.items():
            shape = (factor.lora_B.shape[0], factor.lora_A.shape[1])
            if shapes.setdefault(module, shape) != shape:
                raise ValueError(f"{member.where}: {module} is {shape}, but {shapes[module]} in another adapter.")


def _plain(value: Any) -> Any:
    """As JSON has it: an enum is its text, and None, False and an empty list are one."""
    return json.loads(json.dumps(getattr(value, "value", value))) or None


def _side_by_side(
    readers: Sequence[FactorReader], module: str, scales: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (sum of r, I) and B (O, sum of r) whose product is the weighted sum, float64."""
    lora_A, lora_B = [], []
    for reader, scale in zip(readers, scales, strict=True):
        if module in reader.outline.factors:
            factor = reader[module]
            lora_A.append(factor.lora_A.detach().cpu().double())
            lora_B.append(factor.lora_B.detach().cpu().double() * (scale * factor.scaling))
    return torch.cat(lora_A), torch.cat(lora_B, dim=1)


def _config(members: Sequence[Adapter], rank: int, modules: list[str]) -> dict[str, Any]:
    first = members[0].config
    shared = {field: first[field] for field in SHARED_FIELDS if first.get(field) is not None}
    named = [member.base_model_name_or_path for member in members if member.base_model_name_or_path]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": modules,
        "base_model_name_or_path": named[0] if named else None,
        "revision": base_revision(members),
        **shared,
    }


def _origin(members: Sequence[Adapter]) -> Origin:
    license = strictest(member.origin.license for member in members)
    return Origin(
        license=None if license == UNKNOWN else license,
        task="mean of " + ", ".join(member.name for member in members),
        datasets=tuple(dict.fromkeys(dataset for member in members for dataset in member.origin.datasets)),
    )
