"""Weighted sums of updates as the factors of one adapter: side by side, cut to a rank, delta-W never formed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from tqdm import tqdm

from .adapter import Adapter
from .base_names import base_revision
from .delta import MANY, FactorReader
from .licenses import UNKNOWN, strictest
from .lora import KEY_PREFIX
from .low_rank import truncated
from .manifest import Origin


# What must be equal for members to have one config, beside the modules.
SHARED_FIELDS = ("fan_in_fan_out", "layer_replication", "task_type")


@dataclass(frozen=True)
class FactoredSum:
    """sum_i w_i dW_i, module by module.

    Args:
        factors (`dict`): module -> A (r, I) and B (O, r) with B @ A the sum, float32, r at most the rank asked for.
        norms (`dict[str, float]`): module -> Frobenius norm of the sum, before the cut.
        lost_norm (`float`): share of the Frobenius norm of all modules that the rank cut off, 0 to 1.
    """

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    norms: dict[str, float]
    lost_norm: float


def open_members(members: Sequence[Adapter]) -> list[FactorReader]:
    """Readers of adapters whose updates can be added up.

    Raises:
        ValueError:
            a member is no plain LoRA, holds whole modules, biases or embeddings too, or its modules or config do not
            go with the others'.
    """
    readers = [FactorReader(member) for member in members]
    shapes: dict[str, tuple[int, int]] = {}
    for member, reader in zip(members, readers, strict=True):
        more = [*reader.outline.saved, *reader.outline.copies]
        if more:
            raise ValueError(
                f"{member.where}: it also holds {more[0]}, trained or saved in full; only low-rank updates are added "
                "up."
            )
        for field in SHARED_FIELDS:
            ours, first = (_plain(one.config.get(field)) for one in (member, members[0]))
            if ours != first:
                raise ValueError(
                    f"{field} is {ours!r} in {member.name!r} and {first!r} in {members[0].name!r}; adapters are "
                    "added up where it is the same."
                )
        for module, factor in reader.outline.factors.items():
            shape = (factor.lora_B.shape[0], factor.lora_A.shape[1])
            if shapes.setdefault(module, shape) != shape:
                raise ValueError(f"{member.where}: {module} is {shape}, but {shapes[module]} in another adapter.")
    return readers


def check_rank(rank: int | None) -> None:
    """Raise a `ValueError` where a rank that was given is not a whole number of at least 1."""
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank={rank!r} is not allowed; it is a whole number of at least 1.")


def add_up(
    readers: Sequence[FactorReader], scales: Sequence[float], rank: int | None, label: str = "Merging"
) -> FactoredSum:
    """The factors of sum_i w_i dW_i of at most that rank that are closest to it in Frobenius norm.

    Per module the factors are put side by side, and an SVD of the core between two QRs is cut to the rank (Eckart and
    Young 1936), in float64. One module is in memory at a time.

    Args:
        readers: of the members; a module that one lacks counts as zero there.
        scales: w_i.
        rank (`int`, *optional*): default the sum of the members' ranks: nothing is cut off.
        label (`str`): of the bar, which is shown for many members.
    """
    factors, norms, kept, lost = {}, {}, 0.0, 0.0
    modules = sorted({module for reader in readers for module in reader.outline.factors})
    for module in tqdm(modules, label, unit="module", leave=False, disable=len(readers) < MANY):
        lora_A, lora_B = _side_by_side(readers, module, scales)
        lora_A, lora_B, kept_here, lost_here = truncated(lora_A, lora_B, rank or lora_A.shape[0])
        factors[module] = (lora_A.float(), lora_B.float())
        norms[module] = (kept_here + lost_here) ** 0.5
        kept, lost = kept + kept_here, lost + lost_here
    return FactoredSum(factors, norms, (lost / (kept + lost)) ** 0.5 if kept + lost else 0.0)


def adapter_of(
    name: str,
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    members: Sequence[Adapter],
    *,
    rank: int,
    source: str,
    origin: Origin,
) -> Adapter:
    """An adapter in memory, float32, alpha / r = 1, with one rank: servers such as vLLM read one.

    Args:
        name (`str`): the expert's name.
        factors (`Mapping`): module -> A (r, I) and B (O, r); those of less rank are filled with zeros.
        members: whose base, task type and layout it has.
        rank (`int`): of all modules.
        source (`str`), origin (`Origin`): as in [`Adapter`].
    """
    tensors = {}
    for module, (lora_A, lora_B) in factors.items():
        missing = rank - lora_A.shape[0]
        tensors[f"{KEY_PREFIX}{module}.lora_A.weight"] = pad(lora_A, (0, 0, 0, missing)).contiguous()
        tensors[f"{KEY_PREFIX}{module}.lora_B.weight"] = pad(lora_B, (0, missing)).contiguous()
    return Adapter(name, _config(members, rank, list(factors)), tensors, source, origin)


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


def joint_origin(members: Sequence[Adapter], task: str | None) -> Origin:
    """The origin of an adapter made of several: the strictest licence, and all datasets.

    Args:
        members (`Sequence[Adapter]`): what it is made of.
        task (`str`, *optional*): what it is for.
    """
    license = strictest(member.origin.license for member in members)
    return Origin(
        license=None if license == UNKNOWN else license,
        task=task,
        datasets=tuple(dict.fromkeys(dataset for member in members for dataset in member.origin.datasets)),
    )
