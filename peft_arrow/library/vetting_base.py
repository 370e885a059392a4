"""Whether an adapter is for a base model: its shapes decide, and where they are unknown its name."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .adapter import Adapter
from .base_ids import is_same_base, normalise_base
from .base_shapes import BaseShapes
from .lora import LoraContent
from .vetting_checks import Findings, counted, sentence


def check_base(content: LoraContent | None, adapter: Adapter, shapes: BaseShapes | None, findings: Findings) -> None:
    """Whether the adapter is for the base: its shapes decide, and where they are unknown its name."""
    named = adapter.base_model_name_or_path
    if shapes is None:
        if normalise_base(named) is None:
            findings.warning(
                "base_unnamed", "Its config does not name its base model; name the base to have its shapes compared."
            )
        return
    shapes = shapes.for_task(adapter.task_type)
    if content is None or not shapes.is_known:
        _check_name(named, shapes, findings)
        return
    before = len(findings.problems)
    try:
        if adapter.config.get("layer_replication"):
            shapes = shapes.replicated(adapter.config["layer_replication"])
        _check_shapes(content, named, shapes, findings)
        _check_targets(content, adapter, shapes, findings)
    except ValueError as error:
        findings.problem("malformed", f"{sentence(error)} Ask its author for a complete config, or leave it out.")
    _check_trained(content, shapes, findings)
    if len(findings.problems) == before:
        _check_fitting_name(named, shapes, findings)


def _check_name(named: str | None, shapes: BaseShapes, findings: Findings) -> None:
    """The name where it is all there is: the base's shapes are unknown, or the adapter's."""
    if shapes.name is None:
        return
    name, base = normalise_base(named), normalise_base(shapes.name) or shapes.name
    unseen = "" if shapes.is_known else f" The shapes of {base} could not be had ({shapes.reason})."
    if name is None:
        findings.warning("base_unnamed", f"Its config does not name its base model.{unseen} Make sure it is {base}.")
    elif not is_same_base(named, shapes.name):
        findings.problem("wrong_base", f"Its config names the base {name}, not {base}.{unseen}")
    elif unseen:
        findings.warning(
            "base_unseen",
            f"{unseen.strip()} So only names were compared; pass the loaded model or its folder to compare shapes.",
        )


def _check_fitting_name(named: str | None, shapes: BaseShapes, findings: Findings) -> None:
    """The name of an adapter whose shapes fit."""
    if shapes.name is None:
        return
    name, base = normalise_base(named), normalise_base(shapes.name) or shapes.name
    if name is None:
        findings.warning(
            "base_unnamed",
            f"Its config does not name its base model. Its shapes fit the base {base}; make sure that is it.",
        )
    elif not is_same_base(named, shapes.name):
        findings.warning(
            "base_name",
            f"Its config names the base {name}. Its shapes fit the base {base}, as those of another model of its size "
            "would; make sure that both are the same.",
        )


def _check_shapes(content: LoraContent, named: str | None, shapes: BaseShapes, findings: Findings) -> None:
    base = f"the base {normalise_base(shapes.name)}" if normalise_base(shapes.name) else "the base"
    advice = f" Its config names {normalise_base(named)}: use it with that." if normalise_base(named) else ""
    if is_same_base(named, shapes.name):
        advice = " Its config names this base all the same, so one of the two was changed."
    total, missing, other, unlike = len(content.factors), [], [], []
    for module, factor in content.factors.items():
        found, own = shapes.features(module), (factor.lora_A.shape[1], factor.lora_B.shape[0])
        if shapes.kind(module) is None:
            missing.append(module)
        elif found is None:
            other.append(module)
        elif found != own:
            unlike.append((module, own, found))
    if missing:
        text = (
            f"It is not for {base}, which has no module {missing[0]!r} ({len(missing)} of {total} are missing there)."
        )
        findings.problem("wrong_base", text + advice)
    if unlike:
        module, own, found = unlike[0]
        text = (
            f"It is not for {base}: {module} maps {own[0]} to {own[1]} features in the adapter and {found[0]} to "
            f"{found[1]} in the base ({len(unlike)} of {total} modules differ)."
        )
        findings.problem("wrong_base", text + advice)
    if other:
        findings.problem(
            "unsupported_kind",
            f"{other[0]} is a {shapes.kind(other[0])} in {base} ({counted(other, 'module')}); only linear modules are "
            "routed. Leave it out.",
        )


def _check_targets(content: LoraContent, adapter: Adapter, shapes: BaseShapes, findings: Findings) -> None:
    if findings.problems:
        return
    targets = shapes.targets(adapter.config)
    for left, text in (
        (targets - set(content.factors), "Its config targets {}, but the file has no weights for it"),
        (set(content.factors) - targets, "The file has weights for {}, which its config does not target"),
    ):
        if left:
            findings.problem(
                "malformed",
                f"{text.format(sorted(left)[0])} ({counted(left, 'module')}). The config is of another training than "
                "the file, or it was edited; ask its author.",
            )
            return


def _check_trained(content: LoraContent, shapes: BaseShapes, findings: Findings) -> None:
    for key, tensor in content.saved.items():
        known = shapes.parameter(key)
        if known is not None and known.shape == tensor.shape:
            continue
        found = "has none of that name" if known is None else f"has shape {tuple(known.shape)}"
        text = f"It brings the trained module {key} of shape {tuple(tensor.shape)}; the base {found}."
        if shapes.is_loaded:
            findings.problem("wrong_head", f"{text} Make the base with the head that it was trained with.")
        else:
            findings.warning("wrong_head", f"{text} Make the base with such a head (num_labels) before you use it.")
        break


def check_copies(
    content: LoraContent, adapter: Adapter, keys: Mapping[str, str], shapes: BaseShapes | None, findings: Findings
) -> None:
    """Biases and embeddings in the file: allowed only where they equal the base's."""
    for path, tensor in content.copies.items():
        known = shapes.for_task(adapter.task_type).parameter(path) if shapes is not None else None
        if known is not None and known.shape == tensor.shape and keys and not known.is_meta:
            value = adapter.tensors[keys[path]]
            if torch.equal(known.detach().cpu(), value.to(known.dtype)):
                continue
        elif known is None or known.shape == tensor.shape:
            findings.warning(
                "trained_copies",
                f"The file also holds {path}. It can be used only if that equals the base's; to find out, pass the "
                "loaded base model and weights=True.",
            )
            return
        findings.problem(
            "trained_copies",
            f"The file holds {path} with other values than the base (a trained bias, or an embedding that was trained "
            "or resized), which routing cannot express. Leave it out.",
        )
        return
