"""A side of a benchmark, and which sides there are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from . import mttl, peft_side
from .bases import linear_modules
from .experts import Experts, expert_bytes, write_folders
from .machine import available_bytes
from .ours import kernels, routed_model
from .plain import plain_lora
from .xlora import xlora_model


BASE, PLAIN, OURS, PEFT, MTTL, XLORA = "base", "plain LoRA", "ours auto", "PEFT Arrow", "mttl formula", "X-LoRA"
NOTES = {
    MTTL: "composes parameters; compared with ours in aggregation='parameter'",
    XLORA: "another method with an untrained router, timed only: its outputs are not compared",
}


@dataclass(frozen=True)
class Side:
    """One model in one way of running it.

    Args:
        name (`str`): as printed.
        model (`nn.Module`): sides of ours share one.
        kernel (`str`, *optional*): of ours, set before it runs.
        needs (`Callable[[int], int]`): tokens -> bytes that a forward needs at once inside its widest layer.
        has_cache (`bool`): whether it can decode with a key-value cache.
    """

    name: str
    model: nn.Module
    kernel: str | None = None
    needs: Callable[[int], int] = lambda tokens: 0
    has_cache: bool = True

    def prepare(self) -> None:
        """Have the model run as this side says."""
        if self.kernel is not None:
            self.model.set_kernel(self.kernel)

    def layer(self, module: str) -> nn.Module:
        """What stands in the place of a module of the base."""
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return model.get_submodule(module)


@dataclass(frozen=True)
class Request:
    """What sides are asked for.

    Args:
        top_k (`int`): experts a token.
        only (`tuple[str, ...]`): names of the sides beside base, plain LoRA and ours auto; empty for all.
        peer_bytes (`int`, *optional*): what one other side may take; by default 80 % of what is free when it is made.
        most_xlora (`int`): experts above which X-LoRA is not loaded, because its loader takes quadratic time.
    """

    top_k: int
    only: tuple[str, ...] = ()
    peer_bytes: int | None = None
    most_xlora: int = 32

    def wants(self, name: str) -> bool:
        """Whether this side was asked for."""
        return not self.only or name in self.only

    def budget(self, device: torch.device) -> int:
        """Bytes that one other side may take now."""
        return self.peer_bytes if self.peer_bytes is not None else int(0.8 * available_bytes(device))


def our_sides(base: nn.Module, experts: Experts, request: Request) -> tuple[list[Side], dict[str, str]]:
    """Ours with `auto` and with every kernel, on one model; and the kernels that cannot run here, with the reason."""
    names, absent = kernels(next(base.parameters()).device)
    model = routed_model(base, experts, request.top_k)
    sides = [Side(f"ours {name}", model, kernel=name) for name in names]
    kept = [side for side in sides if side.name == OURS or request.wants(side.name)]
    return kept, {f"ours {name}": reason for name, reason in absent.items() if request.wants(f"ours {name}")}


def all_sides(
    base: nn.Module, experts: Experts, request: Request, tokens: Sequence[int], folder: Path
) -> tuple[list[Side], dict[str, str]]:
    """Every side that was asked for, and those that are not there, name -> reason.

    Args:
        base (`nn.Module`): the base.
        experts (`Experts`): of all sides.
        request (`Request`): which sides.
        tokens (`Sequence[int]`): of the forwards that will be asked for; a side that can run none of them is not made.
        folder (`Path`): where adapters may be written.
    """
    linears, device = linear_modules(base), next(base.parameters()).device
    ours, absent = our_sides(base, experts, request)
    model = ours[0].model
    wants_xlora = request.wants(XLORA) and experts.count <= request.most_xlora
    folders = write_folders(base, experts, folder, experts.count if wants_xlora else 1)
    sides = [Side(BASE, base), Side(PLAIN, plain_lora(base, folders[0])), *ours]
    weights = experts.count * expert_bytes(base, experts.rank)
    shape = {"experts": experts.count, "rank": experts.rank, "base_linears": linears}
    peers = {
        PEFT: (
            lambda: peft_side.peft_arrow_model(base, folders[0], model, request.top_k),
            functools.partial(peft_side.forward_bytes, trains=False, **shape),
        ),
        MTTL: (
            lambda: mttl.composed_model(base, model, request.top_k),
            functools.partial(mttl.forward_bytes, rank=experts.rank, base_linears=linears),
        ),
    }
    for name, (make, needs) in peers.items():
        if not request.wants(name):
            continue
        budget = request.budget(device)
        if too_much(weights + needs(min(tokens)), budget):
            absent[name] = too_much(weights + needs(max(tokens)), budget)
        else:
            sides.append(Side(name, make(), needs=needs))
    if wants_xlora:
        sides.append(Side(XLORA, xlora_model(base, folders, request.top_k), has_cache=False))
    elif request.wants(XLORA):
        absent[XLORA] = f"loads in quadratic time: not loaded above {request.most_xlora} experts"
    return sides, absent


def our_model(sides: Sequence[Side]) -> PeftModel:
    """The routed model that the sides of ours share."""
    return next(side for side in sides if side.kernel is not None).model


def too_much(needed: int, budget: int) -> str:
    """Empty, or why something that needs so many bytes is not run."""
    return f"needs {needed / 2**30:.1f} GiB, {budget / 2**30:.1f} may be used: not run" if needed > budget else ""
