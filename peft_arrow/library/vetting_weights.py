"""What only the weights tell: NaN and Inf, a zero update, the statistics of the update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from .adapter import Adapter
from .delta import FactorReader
from .lora import Factors, LoraContent
from .lora_config import BASE_CHANGING_INITS
from .spectrum import adapter_statistics
from .vetting_checks import Findings, counted


def check_weights(adapter: Adapter, findings: Findings) -> dict[str, float] | None:
    """Read the factors: NaN and Inf, a zero update; the statistics where there is nothing wrong.

    Raises:
        ValueError: the file cannot be read.
    """
    init = adapter.config.get("init_lora_weights")
    changed = isinstance(init, str) and init.startswith(BASE_CHANGING_INITS)
    plain_config = {**adapter.config, "init_lora_weights": True} if changed else adapter.config
    reader = FactorReader(replace(adapter, config=plain_config))
    broken: list[str] = []
    is_zero = True

    def finite() -> Iterator[Factors]:
        nonlocal is_zero
        for module, factor in reader.items():
            bad = [half for half in ("lora_A", "lora_B") if not torch.isfinite(getattr(factor, half)).all()]
            broken.extend(f"{module}.{half}" for half in bad)
            if not bad:
                is_zero = is_zero and not (factor.lora_A.any() and factor.lora_B.any())
                yield factor

    statistics = adapter_statistics(finite())
    if broken:
        findings.problem(
            "not_finite",
            f"{broken[0]} holds NaN or Inf ({counted(broken, 'tensor')} in all): its training broke. Leave it out.",
        )
    elif is_zero:
        findings.problem(
            "zero_update",
            "Its whole update is zero (lora_A or lora_B is 0 in every module): it was saved before it was trained, or "
            "saved wrongly, as under DeepSpeed ZeRO-3. Leave it out.",
        )
    return None if broken or is_zero or changed else statistics


def saved_is_finite(content: LoraContent, adapter: Adapter, keys: Mapping[str, str], findings: Findings) -> None:
    """Whether the fully trained modules hold numbers."""
    for path in content.saved:
        if not torch.isfinite(adapter.tensors[keys[path]]).all():
            findings.problem("not_finite", f"{path} holds NaN or Inf: its training broke. Leave it out.")
            return
