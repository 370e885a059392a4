"""A record of which experts every token went to, module by module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import nn

from ..routers import Routing
from .layer import ArrowLoraLayer
from .trace_report import plot_routing, routing_html, routing_table


@dataclass(frozen=True)
class ModuleTrace:
    """The routing of one module in one call, on the CPU.

    Args:
        top_k_index (`torch.Tensor`):
            int64 (..., K), with the module's batch dimensions; positions in `expert_names`, -1 where the module has
            fewer than K candidates.
        top_k_weights (`torch.Tensor`): float32 (..., K); each row sums to 1, 0 where the index is -1.
    """

    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor


@dataclass
class TraceStep:
    """One call of the model: a forward, or one step of `generate`.

    Args:
        modules (`dict[str, ModuleTrace]`): by the base's own module names.
        attention_mask (`torch.Tensor`, *optional*): (B, S) as passed to the model.
        input_ids (`torch.Tensor`, *optional*): (B, S) as passed to the model.
    """

    modules: dict[str, ModuleTrace] = field(default_factory=dict)
    attention_mask: torch.Tensor | None = None
    input_ids: torch.Tensor | None = None


class RoutingTrace(Mapping):
    """What `model.trace_routing()` recorded; as a mapping, the last call's modules.

    Args:
        expert_names (`list[str]`): what the positions mean.
    """

    def __init__(self, expert_names: list[str]) -> None:
        self.expert_names = expert_names
        self.steps: list[TraceStep] = []

    def __getitem__(self, module: str) -> ModuleTrace:
        if not self.steps:
            raise KeyError(f"{module!r}: nothing was recorded; call the model inside `with model.trace_routing()`.")
        return self.steps[-1].modules[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self.steps[-1].modules if self.steps else ())

    def __len__(self) -> int:
        return len(self.steps[-1].modules) if self.steps else 0

    def table(self) -> str:
        """Share of the routing weight per expert, over all calls, without padding; plain text."""
        return routing_table(self)

    def plot(self, path: str | PathLike) -> None:
        """Draw a heat map, modules by experts, to a picture file. Needs matplotlib (extra `viz`)."""
        plot_routing(self, path)

    def html(self, path: str | PathLike, tokenizer: Any = None) -> None:
        """Write a self-contained page with the chosen expert of each token."""
        routing_html(self, path, tokenizer)


@contextlib.contextmanager
def record_routing(
    model: nn.Module, layers: dict[str, ArrowLoraLayer], adapter_name: str, expert_names: list[str]
) -> Iterator[RoutingTrace]:
    """Record the routing of the adapter's layers while open."""
    trace = RoutingTrace(expert_names)
    names = {id(layer): name for name, layer in layers.items()}

    def begin(module, args, kwargs):
        input_ids = kwargs.get("input_ids", args[0] if args and _is_ids(args[0]) else None)
        trace.steps.append(TraceStep(attention_mask=_copy(kwargs.get("attention_mask")), input_ids=_copy(input_ids)))

    def record(layer, adapter, routing: Routing, shape):
        if adapter != adapter_name or torch._C._current_graph_task_id() != -1:
            return  # inside a backward: the recomputed forward of a checkpointed layer
        name = names[id(layer)]
        if not trace.steps or name in trace.steps[-1].modules:
            trace.steps.append(TraceStep())
        trace.steps[-1].modules[name] = _module_trace(layer, adapter, routing, shape, len(expert_names))

    handle = model.register_forward_pre_hook(begin, with_kwargs=True)
    for layer in layers.values():
        layer.recorder = record
    try:
        yield trace
    finally:
        handle.remove()
        for layer in layers.values():
            layer.recorder = None
        trace.steps = [step for step in trace.steps if step.modules]


def _is_ids(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_floating_point()


def _copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.detach().cpu().clone() if isinstance(tensor, torch.Tensor) and tensor.dim() == 2 else None


def _module_trace(layer: ArrowLoraLayer, adapter: str, routing: Routing, shape, num_experts: int) -> ModuleTrace:
    """Positions in the layer become positions in the model, padded to the K of a module that all experts have."""
    positions = torch.tensor(layer.experts[adapter].positions)
    index_TK = positions[routing.top_k_index.detach().cpu()]
    weights_TK = routing.top_k_weights.detach().float().cpu()
    router = layer.routers[adapter]
    wanted = num_experts if router.uses_all else min(router.top_k, num_experts)
    missing = max(wanted - index_TK.shape[-1], 0)
    index_TK = nn.functional.pad(index_TK, (0, missing), value=-1)
    weights_TK = nn.functional.pad(weights_TK, (0, missing), value=0.0)
    return ModuleTrace(index_TK.reshape(*shape, -1), weights_TK.reshape(*shape, -1))
