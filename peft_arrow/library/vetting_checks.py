"""The single checks of vetting. Each adds findings to a `Findings`; none raises for a bad adapter."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .adapter import Adapter
from .files import PICKLE_NAME, TensorHeader
from .licenses import OTHER, is_allowed, normalise_license
from .lora import FLOAT_DTYPES, LoraContent, outline_lora
from .lora_config import KEPT_BASE_CHANGING_INITS, check_kind
from .report import Finding


MOST_NUMBERS = 2**40


@dataclass
class Findings:
    """What was found so far."""

    problems: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)

    def problem(self, code: str, text: str) -> None:
        """Add a reason why the adapter cannot be used."""
        self.problems.append(Finding(code, text))

    def warning(self, code: str, text: str) -> None:
        """Add something to know before using it."""
        self.warnings.append(Finding(code, text))


def sentence(error: Exception, *owners: str) -> str:
    """An error's text without the adapter's name in front, as a sentence of its own."""
    text = str(error)
    for owner in owners:
        text = text.removeprefix(f"adapter {owner}: ")
    first = text.split(" ")[0]
    return text[:1].upper() + text[1:] if first.isalpha() else text


def counted(things: Collection[Any], name: str) -> str:
    """`1 module`, `3 modules`."""
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def check_files(adapter: Adapter, header: Mapping[str, TensorHeader], findings: Findings) -> LoraContent | None:
    """Take the file apart by its header; None where it is no plain LoRA or config and file contradict each other."""
    owner = f"{adapter.name!r} ({adapter.source})"
    try:
        check_kind(adapter.name, adapter.source, adapter.config)
    except ValueError as error:
        findings.problem("unsupported_kind", f"{sentence(error, owner)} Leave it out.")
        return None
    if any(math.prod(entry.shape) > MOST_NUMBERS or min(entry.shape, default=0) < 0 for entry in header.values()):
        findings.problem("malformed", "The header of its weights states sizes that no adapter has; leave it out.")
        return None
    blank = {
        key: torch.empty(entry.shape, dtype=FLOAT_DTYPES.get(entry.dtype, torch.uint8), device="meta")
        for key, entry in header.items()
    }
    try:
        return outline_lora(replace(adapter, tensors=blank))
    except (ValueError, OverflowError) as error:
        code = "unsupported_kind" if "not supported" in str(error) else "malformed"
        findings.problem(code, f"{sentence(error, owner)} Ask its author for a complete file, or leave it out.")
        return None


def unreadable_weights(error: ValueError, *owners: str) -> Finding:
    """The finding for weights whose header cannot be read."""
    code = "pickle_only" if PICKLE_NAME in str(error) else "unreadable_weights"
    advice = "" if code == "pickle_only" else " Fetch it again, or leave it out."
    return Finding(code, sentence(error, *owners).rstrip(".") + "." + advice)


def check_license(
    stated: str | None, allowed: Collection[str] | None, findings: Findings, normalised: str | None
) -> None:
    """Whether a licence is stated, known and, where a list is given, allowed."""
    if allowed is not None and not is_allowed(stated, allowed):
        what = f"Its licence is {stated!r}" if normalised else "It states no licence"
        findings.problem("license_not_allowed", f"{what}, and only {', '.join(sorted(allowed))} are allowed here.")
    elif normalised is None:
        findings.warning(
            "license_missing",
            "It states no licence, and without one only its author may pass it on; ask before you share it.",
        )
    elif normalised == OTHER:
        findings.warning(
            "license_unknown",
            f"Its licence, {stated!r}, is none that the Hub lists; read the terms before you share it.",
        )


def licence_of(stated: str | None) -> str | None:
    """The Hub's identifier of a stated licence, or None."""
    return normalise_license(stated)


def check_extras(content: LoraContent, adapter: Adapter, findings: Findings) -> None:
    """What peft-arrow takes with a condition."""
    if content.saved:
        names = ", ".join(content.saved_modules) or sorted(content.saved)[0]
        findings.warning(
            "trained_modules",
            f"Beside LoRA it brings fully trained modules ({names}). A routed model has one of each: where several "
            "adapters bring different ones, modules_to_save_from=<name> says whose to take.",
        )
    init = adapter.config.get("init_lora_weights")
    if init in KEPT_BASE_CHANGING_INITS:
        findings.warning(
            "base_changing_init",
            f"Its initialisation ({init}) took a part out of the base weights. peft-arrow computes it again from the "
            "base and adds it to the expert, at twice the rank; it must be exactly the base it was trained on.",
        )


def number(value: Any) -> float | None:
    """A finite number of a config, or None."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if known and abs(value) < 1e300 else None
