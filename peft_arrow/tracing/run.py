"""Texts through a routed model with the trace open: the numbers, the pictures, the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..tuner.trace import RoutingTrace
from ..tuner.trace_pictures import new_figure
from ..tuner.trace_stats import own_positions
from .texts import Text


SUMMARIES = ("all", "kind", "layer", "task")


@dataclass(frozen=True)
class RoutedTexts:
    """What came of it.

    Args:
        trace (`RoutingTrace`): every token of every text.
        tokenizer (`PreTrainedTokenizerBase`): of the base.
        texts (`list[dict]`): `source`, `task`, `prompt`, `generated` and `num_tokens` of each.
        own_experts (`Mapping[str, str]`): task -> its own expert, where it has one.
    """

    trace: RoutingTrace = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    texts: list[dict[str, Any]]
    own_experts: Mapping[str, str]

    def table(self) -> str:
        """What was generated, then the trace's table."""
        lines = []
        for text in self.texts:
            if text["generated"] is not None:
                lines += [f"{text['source']}: {text['generated']!r}"]
        return "\n".join([*lines, *([""] if lines else []), self.trace.table(self.own_experts)])

    def record(self) -> dict[str, Any]:
        """The summary as plain data: texts, and shares, entropy and agreement by all, kind, layer and task."""
        return {
            "expert_names": list(self.trace.expert_names),
            "texts": self.texts,
            "own_experts": dict(self.own_experts),
            "shares": {by: self.trace.shares(by) for by in SUMMARIES},
            "entropy": {by: _plain(self.trace.entropy(by)) for by in SUMMARIES},
            "agreement": {by: _plain(self.trace.agreement(self.own_experts, by)) for by in SUMMARIES},
        }

    def save(self, folder: str | Path) -> list[Path]:
        """Write `routing.json`, `routing.html`, `routing.png` and, where tasks are known, `routing_by_task.png`.

        Raises:
            ImportError: matplotlib is missing; nothing is written then.
        """
        new_figure(1, 1)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = ["routing.json", "routing.html", "routing.png", "routing_by_task.png"]
        paths = [folder / name for name in (names if self.trace.shares("task") else names[:3])]
        self.trace.to_json(paths[0], self.tokenizer)
        self.trace.html(paths[1], self.tokenizer)
        self.trace.plot(paths[2])
        if len(paths) == 4:
            self.trace.plot(paths[3], by="task", own_experts=self.own_experts)
        return paths


@torch.no_grad()
def route_texts(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    *,
    max_new_tokens: int = 0,
    own_experts: Mapping[str, str] | None = None,
) -> RoutedTexts:
    """Send each text through the model, one at a time, so that there is no padding.

    Args:
        model (`PeftModel`): a routed model.
        tokenizer (`PreTrainedTokenizerBase`): of its base.
        texts (`Sequence[Text]`): what it is given.
        max_new_tokens (`int`): how many tokens are generated at most, greedily; 0 for none.
        own_experts (`Mapping[str, str]`, *optional*): task -> its own expert.

    Raises:
        ValueError: a text without tokens, or with more than the base takes; an own expert that is none.
    """
    own_positions(model.expert_names, own_experts)
    batches = [text.encode(tokenizer) for text in texts]
    for text, batch in zip(texts, batches, strict=True):
        _check_length(text, batch["input_ids"].shape[1] + max_new_tokens, model)
    told = []
    with model.trace_routing() as trace:
        for text, batch in zip(texts, batches, strict=True):
            trace.tasks = None if text.task is None else [text.task]
            told.append(_route(model, tokenizer, text, batch, max_new_tokens))
    own = dict(own_experts) if own_experts is not None else {name: name for name in trace.expert_names}
    return RoutedTexts(trace, tokenizer, told, own)


def _route(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, text: Text, batch: Mapping[str, Any], max_new_tokens: int
) -> dict[str, Any]:
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    length, generated = batch["input_ids"].shape[1], None
    if max_new_tokens:
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        ids = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad)
        generated = tokenizer.decode(ids[0, length:], skip_special_tokens=True)
    else:
        model(**batch)
    prompt = tokenizer.decode(batch["input_ids"][0])
    return {"source": text.source, "task": text.task, "prompt": prompt, "generated": generated, "num_tokens": length}


def _check_length(text: Text, length: int, model: PeftModel) -> None:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ValueError(
            f"{text.source} has {length} tokens with those to generate, and the base takes {longest}; give a shorter "
            "text, or generate fewer."
        )


def _plain(measures: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Dataclasses as dicts; NaN, which JSON does not know, as None."""
    plain = {group: asdict(found) for group, found in measures.items()}
    return {
        group: {name: None if math.isnan(value) else value for name, value in found.items()}
        for group, found in plain.items()
    }
