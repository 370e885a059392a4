"""The check before every timing: each side's layers give what ours gives with the kernel `eager`, on equal inputs.

Whole models are not compared entry by entry: where two experts score alike, rounding chooses, and all later layers
see other inputs. So each layer of each side gets the inputs that ours gets, and tokens count whose choice is clear:
the last kept score and the first that is not differ by more than rounding could make up for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from .ours import ADAPTER, prototypes, routed_layers
from .rounds import failure
from .side import BASE, MTTL, PLAIN, XLORA, Side, our_model


# By dtype: the gap of a clear choice, relative to the largest score, and the largest difference allowed, relative to
# the largest change that the experts make in the layer. PEFT scores in the dtype of the factors, ours in float32.
CLEAR = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
ALLOWED = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Of the last logits, relative to the largest change that the experts make in them; close choices flip more in half.
LOGITS = {torch.float32: 0.1, torch.float16: 1.0, torch.bfloat16: 1.0}
DISAGREES = "DIFFERS from ours with the kernel eager"
# Errors by which a kernel says that it is not for this machine, dtype or shape.
NOT_HERE = (ImportError, NotImplementedError, RuntimeError, ValueError)


@dataclass
class Agreement:
    """How far a side is from ours with `eager`.

    Args:
        difference (`float`): the largest of any layer, relative to the largest change that the experts make in it.
        compared (`int`): pairs of a token and a layer with a clear choice.
        pairs (`int`): all such pairs.
        missing (`str`): why the side cannot run here.
        logits (`float`, *optional*): the difference of the last logits, relative to the largest change by the experts.
    """

    difference: float = 0.0
    compared: int = 0
    pairs: int = 0
    missing: str = ""
    logits: float | None = None

    def joined(self, other: Agreement | None) -> Agreement:
        """Of this check and another one of the same side."""
        if other is None:
            return self
        logits = [value for value in (self.logits, other.logits) if value is not None]
        return Agreement(
            max(self.difference, other.difference),
            self.compared + other.compared,
            self.pairs + other.pairs,
            self.missing or other.missing,
            max(logits, default=None),
        )


@torch.no_grad()
def check_sides(sides: Sequence[Side], run: Callable[[nn.Module], object]) -> dict[str, Agreement]:
    """Have `run` call ours with `eager`, and compare every layer of every side with it.

    Returns:
        `dict[str, Agreement]`: by side; `missing` says where a side differs, which is then not to be timed.

    Raises:
        AssertionError: the experts change nothing, so nothing would be compared.
    """
    ours = our_model(sides)
    found = {side.name: Agreement() for side in sides if side.name not in (BASE, XLORA)}
    checked = [side for side in sides if side.name in found and side.kernel != "eager"]

    def compare(name: str, layer: nn.Module, args: tuple, output: torch.Tensor) -> None:
        x = args[0]
        clear = clear_choices(layer, x)
        for side in checked:
            agreement = found[side.name]
            if agreement.missing:
                continue
            expected = expected_of(side, layer, x, output)
            everything = torch.ones_like(clear) if side.name == PLAIN else clear
            try:
                answer = answer_of(side, name, layer, x)
            except NOT_HERE as error:
                agreement.missing = why_missing(side, error)
                continue
            add(agreement, name, layer.base_layer(x), answer, expected, everything)

    ours.set_kernel("eager")
    hooks = [
        layer.register_forward_hook(lambda layer, args, output, name=name: compare(name, layer, args, output))
        for name, layer in routed_layers(ours).items()
    ]
    try:
        run(ours)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def why_missing(side: Side, error: Exception) -> str:
    """A kernel says itself that it is not for this machine; another side may run out of memory.

    Raises:
        Exception: the error, where it is neither.
    """
    if side.kernel not in (None, "auto"):
        return f"not here: {type(error).__name__}: {str(error).splitlines()[0]}"
    return failure(error)


def add(
    agreement: Agreement,
    module: str,
    base: torch.Tensor,
    found: torch.Tensor,
    expected: torch.Tensor,
    clear: torch.Tensor,
) -> None:
    """Count one layer in, after comparing it."""
    dtype = found.dtype
    base, found, expected = (tensor.flatten(0, -2)[clear].float() for tensor in (base, found, expected))
    agreement.pairs += clear.numel()
    agreement.compared += int(clear.sum())
    if not clear.any():
        return
    effect = float((expected - base).abs().max())
    rounding = 4 * torch.finfo(dtype).eps * float(expected.abs().max())
    assert effect > rounding, f"{module}: the experts change the output by {effect:.1e}, which rounding hides"
    difference = float((found - expected).abs().max())
    agreement.difference = max(agreement.difference, difference / effect)
    if difference > ALLOWED[dtype] * effect + rounding:
        agreement.missing = f"{DISAGREES} by {difference / effect:.1e} of the experts' effect in {module}: not timed"


def clear_choices(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """bool (T,): whether no other expert scores almost as the last that is kept."""
    scores_TE = (x.flatten(0, -2).float() @ prototypes(layer).T).abs()
    top_k = layer.routers[ADAPTER].selection.top_k
    if scores_TE.shape[1] <= top_k:
        return torch.ones(len(scores_TE), dtype=torch.bool, device=x.device)
    kept = scores_TE.topk(top_k + 1, dim=-1).values
    return kept[:, -2] - kept[:, -1] > CLEAR[x.dtype] * kept[:, 0]


def expected_of(side: Side, layer: nn.Module, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """What a side should give: what ours gives; for a plain LoRA of expert 0 alone, for mttl with its cross terms."""
    if side.name == PLAIN:
        return layer.base_layer(x) + layer.routed_delta(ADAPTER, x, pins=[{0: 1.0}])
    if side.name == MTTL:
        with setting(layer.aggregations, "parameter"):
            return layer.forward(x)
    return output


def answer_of(side: Side, module: str, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a side gives."""
    if side.kernel is None:
        return side.layer(module)(x)
    with setting(layer.kernels, side.kernel):
        return layer.forward(x)


@contextmanager
def setting(values: dict[str, str], value: str):
    """Have a layer of ours run with another kernel or aggregation."""
    before = values[ADAPTER]
    values[ADAPTER] = value
    try:
        yield
    finally:
        values[ADAPTER] = before


@torch.no_grad()
def check_logits(sides: Sequence[Side], run: Callable[[nn.Module], torch.Tensor], found: dict[str, Agreement]) -> None:
    """Compare the logits that `run` gives with those of ours with `eager`, and put what differs down in `found`.

    Work that layers share is only seen in a whole model. Close choices move logits too, so the bound is wide.
    """
    ours = our_model(sides)
    ours.set_kernel("eager")
    reference = run(ours)
    effect = float((reference - run(next(side for side in sides if side.name == BASE).model)).abs().max())
    for side in sides:
        if side.name in (BASE, PLAIN, MTTL, XLORA) or side.kernel == "eager" or found[side.name].missing:
            continue
        side.prepare()
        found[side.name].logits = float((run(side.model) - reference).abs().max()) / effect
        if found[side.name].logits > LOGITS[reference.dtype]:
            found[
                side.name
            ].missing = f"{DISAGREES} by {found[side.name].logits:.1e} of the experts' effect in the logits: not timed"


def runnable(sides: Sequence[Side], found: Mapping[str, Agreement]) -> tuple[list[Side], dict[str, str]]:
    """The sides to time, and why the others are not."""
    missing = {name: agreement.missing for name, agreement in found.items() if agreement.missing}
    return [side for side in sides if side.name not in missing], missing
