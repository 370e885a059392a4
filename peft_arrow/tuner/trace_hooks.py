"""The hooks that record routing while `trace_routing` is open."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..routers import Routing
from .batch_rows import current_rows
from .layer import ArrowLoraLayer
from .trace import BASE_NAME, ModuleTrace, RoutingTrace, TokenInputs, TraceStep


@contextlib.contextmanager
def record_routing(
    model: nn.Module,
    layers: dict[str, ArrowLoraLayer],
    adapter_name: str,
    expert_names: Sequence[str],
    tasks: Sequence[str] | None = None,
) -> Iterator[RoutingTrace]:
    """Record the routing of the adapter's layers while open; a trace that is open already goes on too.

    Args:
        model (`nn.Module`): the base with its routed layers.
        layers (`dict[str, ArrowLoraLayer]`): the layers by the base's own module names.
        adapter_name (`str`): the PEFT adapter.
        expert_names (`Sequence[str]`): its experts in routing order.
        tasks (`Sequence[str]`, *optional*): the task of each row.
    """
    trace = RoutingTrace(list(expert_names), tasks)
    recording = _Recording(trace, model, layers, adapter_name)
    handles = [
        model.register_forward_pre_hook(recording.begin, with_kwargs=True),
        model.register_forward_hook(recording.end, always_call=True),
    ]
    for stream, module in _streams(model).items():
        handles.append(module.register_forward_pre_hook(recording.begin_stream(stream), with_kwargs=True))
    before = {name: layer.recorder for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.recorder = recording.recorder(name, before[name])
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            layer.recorder = before[name]
        trace.steps = [step for step in trace.steps if step.modules]


def _streams(model: nn.Module) -> dict[str, nn.Module]:
    """The encoder and the decoder of a model that has both, whose tokens are not the same."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return {}
    found = {"encoder": model.get_encoder(), "decoder": model.get_decoder()}
    return {stream: module for stream, module in found.items() if isinstance(module, nn.Module)}


class _Recording:
    """What the hooks share. Each thread has calls of its own."""

    def __init__(
        self, trace: RoutingTrace, model: nn.Module, layers: dict[str, ArrowLoraLayer], adapter_name: str
    ) -> None:
        self.trace, self.adapter_name = trace, adapter_name
        self.num_experts = len(trace.expert_names)
        self.has_streams = bool(_streams(model))
        self.ends = _end_ids(model)
        self.positions = {
            name: torch.tensor([*layer.experts[adapter_name].positions, self.num_experts, -1])
            for name, layer in layers.items()
            if adapter_name in layer.experts
        }
        self.local = threading.local()

    @torch.compiler.disable
    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A call of the model: a new step."""
        inputs = self._inputs(args, kwargs, "")
        self.local.step = TraceStep(attention_mask=inputs.attention_mask, input_ids=inputs.input_ids)
        self.trace.steps.append(self.local.step)
        if self.has_streams:  # cross-attention has the tokens of the encoder, also where that ran before
            self.local.current = {name: known for name, known in self._latest().items() if name == "encoder"}
        else:
            self.local.current = {"": inputs}
            self._latest()[""] = inputs

    @torch.compiler.disable
    def end(self, module: nn.Module, args: tuple, output: Any) -> None:
        """The call is over: a part of the model that is called alone has other tokens."""
        self.local.step, self.local.current = None, {}

    def begin_stream(self, stream: str) -> Callable:
        """The hook for a call of the encoder or the decoder."""

        @torch.compiler.disable
        def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
            inputs = self._inputs(args, kwargs, stream)
            self._latest()[stream] = inputs
            others = {name: known for name, known in self._current().items() if name != stream}
            self.local.current = {**others, stream: inputs}

        return begin

    def recorder(self, name: str, before: Callable | None) -> Callable:
        """What the layer `name` calls; `before` is the recorder of a trace that was open already."""

        @torch.compiler.disable
        def record(layer: ArrowLoraLayer, adapter: str, routing: Routing, shape: torch.Size) -> None:
            if before is not None:
                before(layer, adapter, routing, shape)
            if adapter != self.adapter_name or torch._C._current_graph_task_id() != -1:
                return  # inside a backward: the recomputed forward of a checkpointed layer
            rows = current_rows()
            step = getattr(self.local, "step", None)
            known = None if step is None else step.modules.get(name)
            if step is None or (known is not None and (rows is None or _has(known, rows[0]))):
                step, known = self._next_step(step), None
                self.local.step = step
            found = self._module_trace(name, layer, routing, shape if rows is None else (rows[1], *shape[1:]), rows)
            step.modules[name] = found if known is None else _together(known, found, rows[0])

        return record

    def _next_step(self, step: TraceStep | None) -> TraceStep:
        """A step without a call of the model: a part of it was called, or a module twice in one call."""
        made = TraceStep() if step is None else TraceStep({}, step.attention_mask, step.input_ids)
        self.trace.steps.append(made)
        return made

    def _current(self) -> dict[str, TokenInputs]:
        """Stream -> the tokens of the call that is going on, the newest last."""
        return getattr(self.local, "current", {})

    def _latest(self) -> dict[str, TokenInputs]:
        """Stream -> the tokens of the last call."""
        if not hasattr(self.local, "latest"):
            self.local.latest = {}
        return self.local.latest

    def _inputs(self, args: tuple, kwargs: dict, stream: str) -> TokenInputs:
        ids = _copy(kwargs.get("input_ids", args[0] if args else None))
        ids = None if ids is None or ids.is_floating_point() else ids
        mask = _copy(kwargs.get("attention_mask"))
        known = self._latest().get(stream)
        continues = known if ids is not None and _is_continued(ids, mask, kwargs.get("past_key_values")) else None
        if continues is not None and (continues.input_ids is None or len(continues.input_ids) != len(ids)):
            continues = None
        ended = None if continues is None or ids.shape[1] != 1 else self._ended(ids, continues)
        tasks = None if self.trace.tasks is None else tuple(self.trace.tasks)
        if tasks is not None and ids is not None and (not tasks or len(ids) % len(tasks)):
            raise ValueError(
                f"tasks has {len(tasks)} names for a batch of {len(ids)} rows; it needs one a row, or one for each "
                "prompt where generate makes several rows of it."
            )
        return TokenInputs(ids, mask, tasks, stream, ended, continues)

    def _ended(self, ids: torch.Tensor, continues: TokenInputs) -> torch.Tensor | None:
        if not self.ends:
            return None
        ended = torch.isin(ids[:, 0], torch.tensor(self.ends))
        return ended if continues.ended is None else ended | continues.ended

    def _inputs_of(self, shape: torch.Size) -> TokenInputs | None:
        """The newest tokens that are as many as the module's; None where there are none."""
        for inputs in reversed(self._current().values()):
            known = inputs.input_ids if inputs.input_ids is not None else inputs.attention_mask
            if known is not None and (known.shape == shape or shape == (known.numel(),)):
                return inputs
        return None

    def _module_trace(
        self,
        name: str,
        layer: ArrowLoraLayer,
        routing: Routing,
        shape: tuple[int, ...],
        rows: tuple[list[int], int] | None,
    ) -> ModuleTrace:
        """Positions in the layer become positions in the model, padded to the K of a module that all experts have.

        `rows` are those of the batch that were routed; the others have nothing.
        """
        router = layer.routers[self.adapter_name]
        has_base = router.selection.null_expert is not None
        if has_base and len(self.trace.expert_names) == self.num_experts:
            self.trace.expert_names.append(BASE_NAME)
        index_TK = self.positions[name][routing.top_k_index.detach().cpu()]
        weights_TK = routing.top_k_weights.detach().float().cpu()
        missing = max(router.width(self.num_experts) - index_TK.shape[-1], 0)
        index_TK = nn.functional.pad(index_TK, (0, missing), value=-1)
        weights_TK = nn.functional.pad(weights_TK, (0, missing), value=0.0)
        if rows is not None:
            index_TK, weights_TK = (_spread(values, rows) for values in (index_TK, weights_TK))
        masked = router.selection.masked_experts
        known = [p for p in layer.experts[self.adapter_name].positions if self.trace.expert_names[p] not in masked]
        return ModuleTrace(
            index_TK.reshape(*shape, -1),
            weights_TK.reshape(*shape, -1),
            self.trace.expert_names,
            (*known, self.num_experts) if has_base else tuple(known),
            self._inputs_of(shape),
        )


def _spread(values_TK: torch.Tensor, rows: tuple[list[int], int]) -> torch.Tensor:
    """The values of some rows in those of the whole batch, as (B * S, K); -1 or 0.0 in the others."""
    values = values_TK.reshape(len(rows[0]), -1, values_TK.shape[-1])
    whole = values.new_full((rows[1], *values.shape[1:]), 0 if values.is_floating_point() else -1)
    whole[rows[0]] = values
    return whole.flatten(0, 1)


def _has(known: ModuleTrace, rows: list[int]) -> bool:
    """Whether these rows are recorded already, so that the module was called again."""
    return bool((known.top_k_index[rows] >= 0).any())


def _together(known: ModuleTrace, found: ModuleTrace, rows: list[int]) -> ModuleTrace:
    """Two records of one call of a module, of different rows of the batch."""
    width = max(known.top_k_index.shape[-1], found.top_k_index.shape[-1])
    index, weights = (
        [nn.functional.pad(part, (0, width - part.shape[-1]), value=value) for part in parts]
        for parts, value in (
            ((known.top_k_index, found.top_k_index), -1),
            ((known.top_k_weights, found.top_k_weights), 0.0),
        )
    )
    index[0][rows], weights[0][rows] = index[1][rows], weights[1][rows]
    return replace(known, top_k_index=index[0], top_k_weights=weights[0])


def _copy(value: Any) -> torch.Tensor | None:
    """A copy of ids or a mask (B, S) on the CPU; None for anything else."""
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) and value.dim() == 2 else None


def _is_continued(ids: torch.Tensor, mask: torch.Tensor | None, cache: Any) -> bool:
    """Whether tokens before these are in the cache: the mask covers them too, or the cache says so."""
    if mask is not None and mask.shape[1] > ids.shape[1]:
        return True
    length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
    return int(length) > 0


def _end_ids(model: nn.Module) -> list[int]:
    """The ids that end a text; after one `generate` feeds the row padding until the others have ended too."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [token for token in (found if isinstance(found, (list, tuple)) else [found]) if isinstance(token, int)]
