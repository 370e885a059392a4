"""One adapter in the place of several: the truncated SVD of the mean of their updates, without any data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from ..library.adapter import Adapter
from ..library.delta import MANY
from ..library.library import AdapterLibrary
from ..library.names import check_name
from ..library.sums import adapter_of, add_up, check_rank, joint_origin, open_members
from ..library.versions import framework_versions


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
    readers = open_members(members)
    check_rank(rank)
    ranks = [factor.lora_A.shape[0] for reader in readers for factor in reader.outline.factors.values()]
    rank = max(ranks) if rank is None else rank
    total = add_up(readers, scales, rank, f"Merging {name}")
    source = f"merged from {len(members)} adapters"
    adapter = adapter_of(
        check_name(name),
        total.factors,
        members,
        rank=rank,
        source=source,
        origin=joint_origin(members, "mean of " + ", ".join(member.name for member in members)),
    )
    return Merged(adapter, total.lost_norm)


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
