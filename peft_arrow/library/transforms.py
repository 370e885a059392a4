"""Libraries made of a library: without what is general (GenKnowSub), and the random control of the same norms."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike

import torch

from .adapter import Adapter, AdapterLike, AdapterRef, source_of
from .base_names import check_base
from .delta import FactorReader, update_norm
from .library import AdapterLibrary
from .lora import KEY_PREFIX, Factors, read_lora
from .manifest import Origin
from .sums import adapter_of, add_up, check_rank, joint_origin, open_members
from .versions import framework_versions


SPACES = ("delta", "factors")
# Below this share of the expert's own update a difference is rounding: the float32 factors of one update, written
# with other factors, differ by 1e-7 to 1e-6 of it.
ROUNDING = 1e-5


def subtract_general(
    library: AdapterLibrary,
    general: AdapterLike | Mapping[str, AdapterLike] | Iterable[AdapterLike],
    *,
    space: str = "delta",
    rank: int | None = None,
) -> AdapterLibrary:
    """GenKnowSub (arXiv 2505.10939): each expert without the mean of general adapters, as a new library.

    `space="delta"` subtracts updates: dW_t - mean_g dW_g, exactly, from the factors side by side and an SVD in
    float64. Ranks, alphas and modules may differ. A module that the general adapters lack stays; one that only they
    have gets minus their mean. A module of which nothing but rounding is left is dropped, and named in the notes.

    `space="factors"` is what PEFT's `use_gks=True` does, for comparison: A_t - mean_g A_g and B_t - mean_g B_g, with
    the expert's alpha. That adds -B_g A_t - B_t A_g + B_g A_g to B_t A_t: the last term has the wrong sign.

    The given adapters and their files are left as they are; nothing is subtracted later, when a model is routed.

    Args:
        library (`AdapterLibrary`): the experts.
        general:
            a reference to an adapter or a library, several, or `"mean"`: the library's own mean (a folder of that name
            is `"./mean"`).
        space (`str`): `"delta"` or `"factors"`.
        rank (`int`, *optional*):
            of each expert, for `"delta"`: the closest of that rank in Frobenius norm; the share of the norm that it
            cuts off is in `notes.made["lost_norm"]`. Default: exact, the sum of the ranks that meet in a module.

    Returns:
        `AdapterLibrary`: plain LoRA adapters in memory, float32, with `notes.made`; no evaluation, no pictures.

    Raises:
        ValueError:
            a bad argument; adapters of another base, no plain LoRAs, or all zero; an expert of which nothing is left.
    """
    _check_options(space, rank)
    generals = _generals(library, general)
    for adapter in {id(one): one for one in [*library.values(), *generals]}.values():
        read_lora(adapter)  # finite, and not all zero
    made, found = {"lost_norm": {}, "dropped_modules": {}}, {}
    for name, expert in library.items():
        if space == "factors":
            found[name] = _subtract_factors(expert, generals)
        else:
            found[name], lost, dropped = _subtract_updates(expert, generals, rank)
            made["lost_norm"] |= {name: round(lost, 4)} if rank else {}
            made["dropped_modules"] |= {name: dropped} if dropped else {}
    told = "mean" if general == "mean" else [one.name for one in generals]
    call = f"subtract_general(library, {told!r}, space={space!r}, rank={rank})"
    return _described(library, found, generals, call, made)


def random_like(library: AdapterLibrary, seed: int = 0) -> AdapterLibrary:
    """A control: each expert with random factors of its shapes, and per module the Frobenius norm of its own update.

    A is uniform in +-1 / sqrt(I) as PEFT draws it (Kaiming with a = sqrt(5)), B is normal and then scaled. Numbers
    follow from the seed, the expert's name and the module alone, whatever else is in the library; the global random
    state is not used. Whole modules, biases and embeddings that an expert brings stay its own.

    Args:
        library (`AdapterLibrary`): the experts.
        seed (`int`): another one gives other numbers.

    Returns:
        `AdapterLibrary`: adapters in memory, factors float32, under the same names.

    Raises:
        ValueError: an expert is no plain LoRA.
    """
    found = {}
    for name, expert in library.items():
        tensors = {key: tensor for key, tensor in expert.tensors.items() if ".lora_" not in key}
        for module, factor in FactorReader(expert).items():
            for half, tensor in zip("AB", _random_factors(factor, f"{seed}/{name}/{module}")):
                tensors[f"{KEY_PREFIX}{module}.lora_{half}.weight"] = tensor
        found[name] = replace(expert, tensors=tensors, source=f"random factors, seed {seed}", origin=Origin())
    made = {"command": f"random_like(library, seed={seed})", "versions": framework_versions(), "seeds": [seed]}
    control = AdapterLibrary(found, library.base_model_name_or_path)
    return control.describe("Random adapters with the norms of a library's experts: a control.", made=made)


def _check_options(space: str, rank: int | None) -> None:
    if space not in SPACES:
        raise ValueError(f"space={space!r} is not allowed; it is one of {', '.join(map(repr, SPACES))}.")
    check_rank(rank)
    if rank is not None and space == "factors":
        raise ValueError(f"rank={rank!r} goes with space='delta'; with space='factors' experts keep their rank.")


def _generals(library: AdapterLibrary, general: object) -> list[Adapter]:
    if isinstance(general, str) and general == "mean":
        return list(library.values())
    if isinstance(general, (str, PathLike, AdapterRef, Adapter)):
        general = [general]
    if not isinstance(general, AdapterLibrary):
        general = AdapterLibrary.from_pretrained(general, library.base_model_name_or_path)
    check_base(library.base_model_name_or_path, general.values(), "the library")
    return list(general.values())


def _subtract_updates(
    expert: Adapter, generals: Sequence[Adapter], rank: int | None
) -> tuple[Adapter, float, list[str]]:
    """The expert minus the mean, the lost share of the norm, and the modules of which nothing is left."""
    others = [one for one in generals if one is not expert]
    members = [expert, *others]
    share = 1 / len(generals)
    scales = [1 - share * (len(generals) - len(others)), *(-share for _ in others)]
    readers = open_members(members)
    total = add_up(readers, scales, rank, f"Subtracting from {expert.name}")
    own = {module: update_norm(factor) for module, factor in readers[0].items()}
    dropped = [module for module, norm in own.items() if norm > 0 and total.norms[module] <= ROUNDING * norm]
    factors = {module: pair for module, pair in total.factors.items() if module not in dropped}
    if not factors:
        raise _nothing_left(expert)
    adapter = adapter_of(
        expert.name,
        factors,
        members,
        rank=rank or max(lora_A.shape[0] for lora_A, _ in factors.values()),
        source=_source(expert, generals),
        origin=joint_origin(members, expert.origin.task),
    )
    return adapter, total.lost_norm, dropped


def _subtract_factors(expert: Adapter, generals: Sequence[Adapter]) -> Adapter:
    members = [expert, *generals]
    own, *others = open_members(members)
    tensors, is_left = {}, False
    for module, factor in own.items():
        theirs = [_same_shape(factor, other, module, expert) for other in others]
        lora_A = factor.lora_A.double() - torch.stack([one.lora_A.double() for one in theirs]).mean(0)
        lora_B = factor.lora_B.double() - torch.stack([one.lora_B.double() for one in theirs]).mean(0)
        is_left |= update_norm(Factors(lora_A, lora_B, factor.scaling)) > ROUNDING * update_norm(factor)
        tensors[f"{KEY_PREFIX}{module}.lora_A.weight"] = lora_A.float()
        tensors[f"{KEY_PREFIX}{module}.lora_B.weight"] = lora_B.float()
    more = sorted({module for other in others for module in other.outline.factors} - set(own.outline.factors))
    if more:
        raise ValueError(
            f"{expert.where} has no {more[0]}, which a general adapter has; space='factors' needs the same modules "
            "and ranks, space='delta' does not."
        )
    if not is_left:
        raise _nothing_left(expert)
    return replace(
        expert, tensors=tensors, source=_source(expert, generals), origin=joint_origin(members, expert.origin.task)
    )


def _same_shape(factor: Factors, general: FactorReader, module: str, expert: Adapter) -> Factors:
    found = general[module] if module in general.outline.factors else None
    if found is None or found.lora_A.shape != factor.lora_A.shape:
        what = "lacks it" if found is None else f"has rank {found.lora_A.shape[0]}"
        raise ValueError(
            f"{expert.where}: {module} has rank {factor.lora_A.shape[0]}, and a general adapter {what}; "
            "space='factors' needs the same modules and ranks, space='delta' does not."
        )
    return found


def _nothing_left(expert: Adapter) -> ValueError:
    return ValueError(
        f"{expert.where}: nothing is left of its update; it is what is subtracted, to {ROUNDING:g} of its norm. "
        f"Leave it out: library.without([{expert.name!r}])."
    )


def _source(expert: Adapter, generals: Sequence[Adapter]) -> str:
    return f"{expert.source} without the mean of {len(generals)} general adapters"


def _described(
    library: AdapterLibrary, found: dict[str, Adapter], generals: Sequence[Adapter], call: str, made: dict[str, dict]
) -> AdapterLibrary:
    notes = {
        "command": call,
        "versions": framework_versions(),
        "general": {one.name: source_of(one) for one in generals},
        **{name: told for name, told in made.items() if told},
        **({"experts": dict(library.notes.made)} if library.notes.made else {}),
    }
    text = f"{len(found)} experts without the mean of {len(generals)} general adapters (GenKnowSub, arXiv 2505.10939)."
    return AdapterLibrary(found, library.base_model_name_or_path).describe(text, made=notes)


def _random_factors(factor: Factors, key: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big", signed=True)
    )
    bound = factor.lora_A.shape[1] ** -0.5
    lora_A = torch.empty(factor.lora_A.shape, dtype=torch.float64).uniform_(-bound, bound, generator=generator)
    lora_B = torch.empty(factor.lora_B.shape, dtype=torch.float64).normal_(generator=generator)
    lora_B *= update_norm(factor) / update_norm(Factors(lora_A, lora_B, factor.scaling))
    return lora_A.float(), lora_B.float()
