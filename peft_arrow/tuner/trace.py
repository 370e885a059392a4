"""A record of which experts every token went to, module by module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch

from .trace_page import routing_html
from .trace_pictures import plot_routing
from .trace_report import routing_table
from .trace_rows import TracedRow, to_records, traced_rows, write_json
from .trace_stats import Agreement, Entropy, routing_agreement, routing_entropy, routing_shares


BASE_NAME = "__base__"


@dataclass(frozen=True, eq=False)
class TokenInputs:
    """The tokens that one call of the model, or of its encoder or decoder, was given.

    Args:
        input_ids (`torch.Tensor`, *optional*): int64 (B, S), on the CPU; None where embeddings were passed.
        attention_mask (`torch.Tensor`, *optional*): (B, S or longer) as passed to the model.
        tasks (`tuple[str, ...]`, *optional*): the task of each row, or of each B / len(tasks) rows in a row.
        stream (`str`): `"encoder"` or `"decoder"`, empty where the model has one stream of tokens.
        ended (`torch.Tensor`, *optional*):
            bool (B,), rows whose text had ended: `generate` passes padding for them, which its mask does not tell.
        continues (`TokenInputs`, *optional*): what the tokens continue, as a decoding step does.
    """

    input_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    tasks: tuple[str, ...] | None = None
    stream: str = ""
    ended: torch.Tensor | None = None
    continues: TokenInputs | None = None


@dataclass(frozen=True, eq=False)
class ModuleTrace:
    """The routing of one module in one call, on the CPU.

    Args:
        top_k_index (`torch.Tensor`):
            int64 (..., K), with the module's batch dimensions; positions in `expert_names`, -1 where nothing was
            chosen: the module has fewer than K candidates, or the router kept fewer.
        top_k_weights (`torch.Tensor`): float32 (..., K); each row sums to 1, 0 where the index is -1.
        expert_names (`Sequence[str]`): what the positions mean.
        candidates (`tuple[int, ...]`): positions of the experts that the router could choose here.
        inputs (`TokenInputs`, *optional*): the tokens, where they are known.
    """

    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor
    expert_names: Sequence[str] = ()
    candidates: tuple[int, ...] = ()
    inputs: TokenInputs | None = None

    @property
    def experts(self) -> list:
        """The experts' names, a list nested as `top_k_index`; None where the index is -1."""
        return _named(self.top_k_index.tolist(), [*self.expert_names, None])


def _named(index: Any, names: Sequence[str | None]) -> Any:
    return [_named(inner, names) for inner in index] if isinstance(index, list) else names[index]


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
        expert_names (`list[str]`): what the positions mean; `"__base__"` is last where the null expert was used.
        tasks (`Sequence[str]`, *optional*): the task of each row of the batches that are recorded.

    Attributes:
        steps (`list[TraceStep]`): every call, in order.
        tasks (`Sequence[str]`, *optional*): may be set anew before each call of the model.
    """

    def __init__(self, expert_names: list[str], tasks: Sequence[str] | None = None) -> None:
        self.expert_names = expert_names
        self.tasks = tasks
        self.steps: list[TraceStep] = []

    def __getitem__(self, module: str) -> ModuleTrace:
        if not self.steps:
            raise KeyError(f"{module!r}: nothing was recorded; call the model inside `with model.trace_routing()`.")
        return self.steps[-1].modules[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self.steps[-1].modules if self.steps else ())

    def __len__(self) -> int:
        return len(self.steps[-1].modules) if self.steps else 0

    def rows(self, tokenizer: Any = None) -> list[TracedRow]:
        """Each text with the experts of its tokens, prefill and decoding joined and padding left out."""
        return traced_rows(self, tokenizer)

    def records(self, tokenizer: Any = None) -> list[dict[str, Any]]:
        """One dict a token and module, for a data frame: what it is, and its experts' names and weights."""
        return to_records(self, tokenizer)

    def to_json(self, path: str | PathLike, tokenizer: Any = None) -> None:
        """Write experts, modules and rows with all indices and weights as JSON; see docs/introspection.md."""
        write_json(self, path, tokenizer)

    def shares(self, by: str = "layer") -> dict[str, list[float]]:
        """Each expert's share of the routing weight in each group; the shares of a group sum to 1.

        Args:
            by (`str`): `"all"`, `"task"`, `"layer"`, `"kind"` (q_proj ...) or `"module"`.
        """
        return routing_shares(self, by)

    def entropy(self, by: str = "layer") -> dict[str, Entropy]:
        """How many experts share a token, and how many are in use over all tokens; see [`Entropy`]."""
        return routing_entropy(self, by)

    def agreement(self, own_experts: Mapping[str, str] | None = None, by: str = "all") -> dict[str, Agreement]:
        """How often tokens went to their own task's expert, with the rate of chance; see [`Agreement`].

        Args:
            own_experts (`Mapping[str, str]`, *optional*):
                task -> the name of its expert; by default the tasks that are called as an expert is.
            by (`str`): as for `shares`.

        Raises:
            ValueError: an expert that is not in the trace.
        """
        return routing_agreement(self, own_experts, by)

    def table(self, own_experts: Mapping[str, str] | None = None) -> str:
        """Shares, entropy and agreement with the tasks' own experts, without padding; plain text."""
        return routing_table(self, own_experts)

    def plot(self, path: str | PathLike, by: str = "layer", own_experts: Mapping[str, str] | None = None) -> None:
        """Draw the shares, layers (or tasks, kinds, modules) by experts, to a picture. Needs matplotlib (`viz`).

        Args:
            path (`str` or `PathLike`): the picture: PNG, PDF or SVG.
            by (`str`): as for `shares`; with `"layer"` the number of experts that share a token is drawn beside.
            own_experts (`Mapping[str, str]`, *optional*): task -> expert, framed where `by` is `"task"`.
        """
        plot_routing(self, path, by, own_experts)

    def html(self, path: str | PathLike, tokenizer: Any = None) -> None:
        """Write a self-contained page: each text with the experts behind each token, layer by layer."""
        routing_html(self, path, tokenizer)
