"""A trace read text by text: the calls of `generate` joined, padding left out; as rows, records and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from .trace_stats import by_row, counted_tokens, kind_of, layer_of, task_of_rows


if TYPE_CHECKING:
    from .trace import ModuleTrace, RoutingTrace, TokenInputs

JSON_VERSION = 1
# What a tokenizer writes for a token that is a part of a character.
INCOMPLETE = "\ufffd"
# In bytes of UTF-8, and so in tokens.
LONGEST_CHARACTER = 4


@dataclass(frozen=True, eq=False)
class TracedRow:
    """One row of a batch, from the prompt to the last token that the model was given.

    The last token that `generate` makes is not given to the model any more, so it has no experts.

    Args:
        call (`int`): which call of the model, from 0; decoding steps belong to the call that they continue.
        row (`int`): the row of its batch.
        task (`str`, *optional*): its task.
        stream (`str`): `"encoder"`, `"decoder"`, or empty.
        token_ids (`list[int | None]`): T ids; None where the model was given embeddings.
        tokens (`list[str]`): the text of each token; `"[id]"` without a tokenizer.
        num_prompt_tokens (`int`): how many of them are of the prompt; the others were generated.
        top_k_index (`dict[str, torch.Tensor]`): module -> int64 (T, K), as in `ModuleTrace`.
        top_k_weights (`dict[str, torch.Tensor]`): module -> float32 (T, K).
        expert_names (`Sequence[str]`): what the positions mean.
    """

    call: int
    row: int
    task: str | None
    stream: str
    token_ids: list[int | None]
    tokens: list[str]
    num_prompt_tokens: int
    top_k_index: dict[str, torch.Tensor] = field(repr=False)
    top_k_weights: dict[str, torch.Tensor] = field(repr=False)
    expert_names: Sequence[str] = field(repr=False)

    @property
    def title(self) -> str:
        """The task and where the row is from, for a heading."""
        place = f"call {self.call + 1}, row {self.row + 1}"
        return ", ".join(part for part in (self.task, place, self.stream) if part)

    def experts(self, module: str) -> list[dict[str, float]]:
        """For each token the names of its experts in a module and their weights, the largest first."""
        pairs = zip(self.top_k_index[module].tolist(), self.top_k_weights[module].tolist(), strict=True)
        named = ([(self.expert_names[i], w) for i, w in zip(*pair, strict=True) if i >= 0] for pair in pairs)
        return [dict(sorted(found, key=lambda item: -item[1])) for found in named]


@dataclass(eq=False)
class _Part:
    """The modules that got the same tokens, as (B, S, K), and which of the tokens count."""

    inputs: TokenInputs | None
    kept: torch.Tensor
    modules: dict[str, tuple[torch.Tensor, torch.Tensor]]


def traced_rows(trace: RoutingTrace, tokenizer: Any = None) -> list[TracedRow]:
    """The rows of all calls in order, those without a token left out; see [`TracedRow`]."""
    rows = []
    for call, parts in enumerate(_calls(trace)):
        names = [name for name in parts[0].modules if all(name in part.modules for part in parts)]
        joined = {name: _join([part.modules[name] for part in parts]) for name in names}
        for row in range(len(parts[0].kept)):
            found = _traced_row(call, row, parts, joined, tokenizer, trace.expert_names)
            rows += [found] if found.tokens else []
    return rows


def _calls(trace: RoutingTrace) -> list[list[_Part]]:
    """The parts of each call: the prefill, then the decoding steps."""
    calls: list[list[_Part]] = []
    call_of: dict[int, list[_Part]] = {}
    for step in trace.steps:
        for inputs, modules in _by_inputs(step.modules):
            part = _part(inputs, modules)
            continues = inputs.continues if inputs is not None else None
            known = call_of.get(id(inputs)) if inputs is not None else None
            if known is not None:  # a module that is called twice in one call of the model
                _merge(known[-1], part)
                continue
            call = call_of.get(id(continues)) if continues is not None else None
            if call is None:
                call = []
                calls.append(call)
            call.append(part)
            if inputs is not None:
                call_of[id(inputs)] = call
    return calls


def _by_inputs(modules: Mapping[str, ModuleTrace]) -> Iterator[tuple[TokenInputs | None, dict[str, ModuleTrace]]]:
    """The modules of a step by the tokens that they got; without known tokens those of the first one's shape."""
    known = {id(module.inputs): module.inputs for module in modules.values() if module.inputs is not None}
    for key, inputs in known.items():
        yield inputs, {name: module for name, module in modules.items() if id(module.inputs) == key}
    if not known and modules:
        shape = next(iter(modules.values())).top_k_index.shape[:-1]
        yield None, {name: module for name, module in modules.items() if module.top_k_index.shape[:-1] == shape}


def _part(inputs: TokenInputs | None, modules: Mapping[str, ModuleTrace]) -> _Part:
    found = {name: by_row(module) for name, module in modules.items()}
    shape = tuple(next(iter(found.values()))[0].shape[:2])
    return _Part(inputs, counted_tokens(inputs, shape), found)


def _merge(part: _Part, again: _Part) -> None:
    for name, pair in again.modules.items():
        number = 2
        while f"{name}#{number}" in part.modules:
            number += 1
        part.modules[f"{name}#{number}" if name in part.modules else name] = pair


def _join(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of all parts, (B, T, K); K may differ where the router was changed in between."""
    width = max(index.shape[-1] for index, _ in pairs)
    index = [pad(index, (0, width - index.shape[-1]), value=-1) for index, _ in pairs]
    weights = [pad(weights, (0, width - weights.shape[-1]), value=0.0) for _, weights in pairs]
    return torch.cat(index, dim=1), torch.cat(weights, dim=1)


def _traced_row(
    call: int,
    row: int,
    parts: Sequence[_Part],
    joined: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    tokenizer: Any,
    expert_names: Sequence[str],
) -> TracedRow:
    ids: list[int | None] = []
    for part in parts:
        kept_S = part.kept[row]
        known = part.inputs.input_ids if part.inputs is not None else None
        ids += known[row][kept_S].tolist() if known is not None else [None] * int(kept_S.sum())
    kept_T = torch.cat([part.kept[row] for part in parts])
    first = parts[0].inputs
    return TracedRow(
        call=call,
        row=row,
        task=task_of_rows(first, len(parts[0].kept))[row],
        stream=first.stream if first is not None else "",
        token_ids=ids,
        tokens=token_texts(ids, tokenizer),
        num_prompt_tokens=int(parts[0].kept[row].sum()),
        top_k_index={name: index[row][kept_T] for name, (index, _) in joined.items()},
        top_k_weights={name: weights[row][kept_T] for name, (_, weights) in joined.items()},
        expert_names=expert_names,
    )


def token_texts(ids: Sequence[int | None], tokenizer: Any) -> list[str]:
    """The text that each token adds to those before it; `"[id]"` without a tokenizer, `"[position]"` without ids.

    A tokenizer may write a token otherwise when it is alone (a leading space is lost), so each is read with the ones
    before it. A token that is a part of a character adds `"\\ufffd"`, the last part the character.
    """
    if tokenizer is None or None in ids:
        return [f"[{position if token is None else token}]" for position, token in enumerate(ids)]
    texts: list[str] = []
    start = told = 0  # decoded for the context, and what the texts cover
    for position, token in enumerate(ids):
        before, whole = tokenizer.decode(ids[start:told]), tokenizer.decode(ids[start : position + 1])
        if whole.endswith(INCOMPLETE) and position + 1 - told < LONGEST_CHARACTER:
            texts.append(INCOMPLETE)
            continue
        texts.append(whole[len(before) :] if whole.startswith(before) else tokenizer.decode([token]))
        start, told = told, position + 1
    return texts


def to_records(trace: RoutingTrace, tokenizer: Any = None) -> list[dict[str, Any]]:
    """One flat dict a token and module; see `RoutingTrace.records`."""
    records = []
    for row in traced_rows(trace, tokenizer):
        for module in row.top_k_index:
            for position, experts in enumerate(row.experts(module)):
                records.append(
                    {
                        "call": row.call,
                        "row": row.row,
                        "task": row.task,
                        "position": position,
                        "token_id": row.token_ids[position],
                        "token": row.tokens[position],
                        "is_generated": position >= row.num_prompt_tokens,
                        "module": module,
                        "layer": layer_of(module),
                        "kind": kind_of(module),
                        "experts": list(experts),
                        "weights": list(experts.values()),
                    }
                )
    return records


def write_json(trace: RoutingTrace, path: Any, tokenizer: Any = None) -> None:
    """Write the rows as JSON: experts once, indices and weights as nested lists (T, K) by module."""
    rows = [
        {
            "call": row.call,
            "row": row.row,
            "task": row.task,
            "stream": row.stream,
            "token_ids": row.token_ids,
            "tokens": row.tokens,
            "num_prompt_tokens": row.num_prompt_tokens,
            "top_k_index": {name: index.tolist() for name, index in row.top_k_index.items()},
            "top_k_weights": {name: _rounded(weights) for name, weights in row.top_k_weights.items()},
        }
        for row in traced_rows(trace, tokenizer)
    ]
    content = {"format_version": JSON_VERSION, "expert_names": list(trace.expert_names), "rows": rows}
    Path(path).write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def _rounded(weights_TK: torch.Tensor) -> list[list[float]]:
    return [[round(weight, 6) for weight in row] for row in weights_TK.double().tolist()]
