"""The sides of a training step: ours and PEFT's Arrow with their experts trainable, and a plain LoRA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from .bases import linear_modules
from .experts import Experts, expert_bytes, write_folders
from .ours import ADAPTER, kernels, routed_layers, routed_model
from .peft_side import forward_bytes, peft_arrow_model
from .plain import plain_lora
from .side import OURS, PEFT, PLAIN, Request, Side, our_model, too_much
from .verify import DISAGREES, NOT_HERE, Agreement, why_missing


# Largest difference of all gradients of a model together, relative to their length: close choices move them a little.
ALLOWED = 2e-2


def training_sides(
    base: nn.Module, experts: Experts, request: Request, tokens: int, folder: Path
) -> tuple[list[Side], dict[str, str]]:
    """A plain LoRA, ours with each kernel, PEFT's Arrow; and the sides that need too much memory or cannot run here.

    Args:
        base (`nn.Module`): the base.
        experts (`Experts`): of both.
        request (`Request`): which sides.
        tokens (`int`): of a step, batch and sequence together.
        folder (`Path`): where an adapter may be written.
    """
    device = next(base.parameters()).device
    held = 4 * experts.count * expert_bytes(base, experts.rank)  # weights, gradients and two moments of AdamW
    missing = too_much(held, request.budget(device))
    if missing:
        return [], {OURS: missing}
    names, absent = kernels(device)
    ours = routed_model(base, experts, request.top_k, trainable=True)
    written = write_folders(base, experts, folder, 1)
    sides = [Side(f"ours {name}", ours, kernel=name) for name in names]
    sides = [side for side in sides if side.name == OURS or request.wants(side.name)]
    sides.insert(0, Side(PLAIN, plain_lora(base, written[0], trainable=True)))
    absent = {f"ours {name}": reason for name, reason in absent.items() if request.wants(f"ours {name}")}
    if request.wants(PEFT):
        needed = forward_bytes(tokens, experts.count, experts.rank, linear_modules(base), trains=True)
        missing = too_much(held + needed, request.budget(device))
        if missing:
            absent[PEFT] = missing
        else:
            sides.append(Side(PEFT, peft_arrow_model(base, written[0], ours, request.top_k, trainable=True)))
    return sides, absent


def check_gradients(
    sides: list[Side],
    loss: Callable[[nn.Module], torch.Tensor],
    x: torch.Tensor | None = None,
    allowed: float = ALLOWED,
) -> dict[str, Agreement]:
    """Compare the gradients of all experts' factors, after one backward, with those of ours with `eager`.

    Args:
        sides (`list[Side]`): of `training_sides`.
        loss (`Callable[[nn.Module], torch.Tensor]`): a model -> what is differentiated.
        x (`torch.Tensor`, *optional*): an input whose gradient is compared too.
        allowed (`float`): the largest difference of all gradients together, relative to their length.

    Returns:
        `dict[str, Agreement]`: by side but the plain LoRA; `missing` says where one differs.
    """
    ours = our_model(sides)
    reference = gradients(Side("reference", ours, kernel="eager"), ours, loss, x)
    length = sum(float(gradient.square().sum()) for gradient in reference.values()) ** 0.5
    assert length > 0, "the experts get no gradients"
    found = {side.name: Agreement() for side in sides if side.name != PLAIN}
    for side in sides:
        if side.kernel == "eager" or side.name == PLAIN:
            continue
        agreement = found[side.name]
        try:
            others = gradients(side, ours, loss, x)
        except NOT_HERE as error:
            agreement.missing = why_missing(side, error)
            continue
        apart = sum(float((others[key] - gradient).square().sum()) for key, gradient in reference.items()) ** 0.5
        agreement.difference = apart / length
        if not agreement.difference <= allowed:
            agreement.missing = f"{DISAGREES} by {agreement.difference:.1e} in the gradients: not timed"
    return found


def gradients(
    side: Side, ours: PeftModel, loss: Callable[[nn.Module], torch.Tensor], x: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The gradients of a step: module and half -> (E R, I) or (O, E R); and `"x"`."""
    side.prepare()
    loss(side.model).backward()
    found = {} if x is None else {"x": x.grad}
    for name, layer in routed_layers(ours).items():
        other = side.layer(name)
        for half, dim in (("A", 0), ("B", 1)):
            if side.kernel is None:
                factors = getattr(other, f"lora_{half}")
                pieces = [factors[f"task_{expert}"].weight.grad for expert in range(len(layer.experts[ADAPTER].ranks))]
            else:
                pieces = [getattr(other, f"arrow_lora_{half}")[ADAPTER].weight.grad]
            found[f"{name}.{half}"] = torch.cat(pieces, dim=dim)
    side.model.zero_grad(set_to_none=True)
    if x is not None:
        x.grad = None
    return found
