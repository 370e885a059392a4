"""What an adaptation begins with: a library's experts as tensors of one shape, and one LoRA made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from peft import LoraConfig
from torch.nn.functional import pad

from ..library.adapter import Adapter
from ..library.delta import FactorReader
from ..library.lora import KEY_PREFIX, read_lora
from ..library.low_rank import truncated
from ..library.sums import open_members


AGGREGATIONS = ("parameter", "output")
Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Experts:
    """A library's experts, brought to one form: every module of any of them, the largest rank, one scaling.

    Args:
        members (`Sequence[Adapter]`): plain LoRAs that also hold nothing else.
        readers (`Sequence[FactorReader]`): of them.
        rank (`int`): R, the largest of a module of a member.
        scaling (`float`): alpha / r of the first member's first module, and of what is made of them.
    """

    members: Sequence[Adapter]
    readers: Sequence[FactorReader]
    rank: int
    scaling: float

    @cached_property
    def modules(self) -> list[str]:
        """The modules that a member has, sorted."""
        return sorted({module for reader in self.readers for module in reader.outline.factors})

    def items(self) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
        """Module -> A (E, R, I) and B (E, O, R), float32, one module at a time.

        A member of less rank is filled with zeros, and one without the module is zero: neither changes its update.
        Where a member's scaling is another, its B takes the difference.
        """
        for module in self.modules:
            yield module, self._padded(module)

    def _padded(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        found = [reader[module] if module in reader.outline.factors else None for reader in self.readers]
        known = next(factor for factor in found if factor is not None)
        stack_A = torch.zeros(len(found), self.rank, known.lora_A.shape[1])
        stack_B = torch.zeros(len(found), known.lora_B.shape[0], self.rank)
        for place, factor in enumerate(found):
            if factor is not None:
                missing = self.rank - factor.lora_A.shape[0]
                stack_A[place] = pad(factor.lora_A.float(), (0, 0, 0, missing))
                stack_B[place] = pad(factor.lora_B.float() * (factor.scaling / self.scaling), (0, missing))
        return stack_A, stack_B

    def lora_config(self, dropout: float) -> LoraConfig:
        """Of the one LoRA that is made of the experts."""
        first = self.members[0].config
        targets = [member.config.get("target_modules") for member in self.members]
        are_one = all(isinstance(names, list) and sorted(names) == sorted(targets[0]) for names in targets)
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.scaling * self.rank,
            lora_dropout=dropout,
            target_modules=sorted(targets[0]) if are_one else self.modules,
            fan_in_fan_out=bool(first.get("fan_in_fan_out")),
            task_type=self.members[0].task_type or "CAUSAL_LM",
        )


def open_experts(members: Sequence[Adapter]) -> Experts:
    """Check the experts of a library and find what they have in common.

    Raises:
        ValueError: one is no plain LoRA, not finite or all zero, holds whole modules too, or does not go with others.
    """
    for member in members:
        read_lora(member)
    readers = open_members(members)
    layers = [factor for reader in readers for factor in reader.outline.factors.values()]
    return Experts(members, readers, max(factor.lora_A.shape[0] for factor in layers), layers[0].scaling)


def mixed(experts: Experts, weights: Mapping[str, Sequence[float]], aggregation: str) -> Factors:
    """One LoRA as a weighted sum of the experts.

    `"parameter"` is the paper's (arXiv 2405.11157, section 4): A = sum w_i A_i and B = sum w_i B_i, which adds cross
    terms B_i A_j and is meant for experts that began with the same A. `"output"` is the LoRA of the experts' rank that
    is closest to sum w_i dW_i (Eckart and Young 1936), for any experts.

    Args:
        experts (`Experts`): the experts.
        weights (`Mapping[str, Sequence[float]]`): module -> one for each expert.
        aggregation (`str`): `"parameter"` or `"output"`.

    Returns:
        `dict`: module -> A (R, I) and B (O, R), float32.
    """
    found = {}
    for module, (stack_A, stack_B) in experts.items():
        w_E = torch.tensor(weights[module], dtype=torch.float32)
        if aggregation == "parameter":
            found[module] = torch.tensordot(w_E, stack_A, 1), torch.tensordot(w_E, stack_B, 1)
        else:
            lora_A = stack_A.flatten(0, 1).double()
            lora_B = (stack_B * w_E[:, None, None]).transpose(0, 1).flatten(1).double()
            lora_A, lora_B, *_ = truncated(lora_A, lora_B, experts.rank)
            missing = experts.rank - lora_A.shape[0]
            found[module] = pad(lora_A.float(), (0, 0, 0, missing)), pad(lora_B.float(), (0, missing))
    return found


@torch.no_grad()
def set_factors(model: torch.nn.Module, factors: Factors, adapter_name: str = "default") -> None:
    """Copy factors into the fresh LoRA of a PEFT model.

    Raises:
        ValueError: a module has another shape, or the model has no LoRA there.
    """
    for module, halves in factors.items():
        for half, tensor in zip("AB", halves):
            weight = linear_of(model, module, half, adapter_name).weight
            if weight.shape != tensor.shape:
                raise ValueError(
                    f"{module}: the library's lora_{half} is {tuple(tensor.shape)}, and the base takes "
                    f"{tuple(weight.shape)}; the library is of another base model."
                )
            weight.copy_(tensor)


def linear_of(model: torch.nn.Module, module: str, half: str, adapter_name: str = "default") -> torch.nn.Module:
    """The linear module that holds lora_A or lora_B.

    Raises:
        ValueError: the model has no LoRA there.
    """
    path = f"{KEY_PREFIX}{module}.lora_{half}.{adapter_name}"
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"the library adapts {module!r}, and the base has no such module.") from error
