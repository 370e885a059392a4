"""What a trace amounts to: shares, entropy and agreement with the tasks' own experts. Padding never counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from .trace import ModuleTrace, RoutingTrace, TokenInputs

GROUPINGS = ("all", "task", "layer", "kind", "module")


@dataclass(frozen=True)
class Entropy:
    """How many experts share a token, and how many are in use.

    With w the routing weights of one token in one module, H = -sum w ln w in nats: 0 for one expert, ln E for E
    experts with equal weights; exp(H) is the number of experts with equal weights of the same entropy.

    Args:
        nats (`float`): the mean of H over the tokens and modules of the group; NaN where there are none.
        of_shares (`float`): H of the group's shares: high where tokens go to different experts.
    """

    nats: float
    of_shares: float

    @property
    def experts(self) -> float:
        """exp(nats): the experts that share a token."""
        return math.exp(self.nats)

    @property
    def experts_in_use(self) -> float:
        """exp(of_shares): the experts that are in use over all tokens of the group."""
        return math.exp(self.of_shares)


@dataclass(frozen=True)
class Agreement:
    """How often the routing is what an oracle would do, which sends a token to its own task's expert.

    Counted are tokens whose task has an own expert, in the modules that this expert has.

    Args:
        top (`float`): share of them whose largest weight is on the own expert; a tie of n counts 1 / n.
        weight (`float`): mean weight on the own expert.
        chance (`float`): what both are where experts are drawn at random: the mean of 1 / candidates of the module.
        tokens (`int`): how many were counted, each once a module.
    """

    top: float
    weight: float
    chance: float
    tokens: int


class Sums:
    """Sums over tokens, float64, that can be added up.

    Args:
        num_experts (`int`): E, of the trace.
    """

    def __init__(self, num_experts: int) -> None:
        self.weights_E = torch.zeros(num_experts, dtype=torch.float64)
        self.tokens = self.own_tokens = 0
        self.entropy = self.own_top = self.own_weight = self.chance = 0.0

    def count(self, index_TK: torch.Tensor, weights_TK: torch.Tensor, own: int | None, candidates: int) -> None:
        """Add tokens of one module; `own` is the position of their own expert, where it is a candidate."""
        chosen_TK = index_TK >= 0
        weights_TK = weights_TK.double() * chosen_TK
        self.weights_E += torch.bincount(index_TK[chosen_TK], weights_TK[chosen_TK], minlength=len(self.weights_E))
        total_T1 = weights_TK.sum(-1, keepdim=True)
        routed_TK = (weights_TK / total_T1)[total_T1.squeeze(-1) > 0]
        self.tokens += len(routed_TK)
        self.entropy -= float(torch.xlogy(routed_TK, routed_TK).sum())
        if own is None:
            return
        own_T = (weights_TK * (index_TK == own)).sum(-1)
        top_T = weights_TK.amax(-1)
        ties_T = ((weights_TK == top_T[:, None]) & chosen_TK).sum(-1).clamp_min(1)
        self.own_tokens += len(own_T)
        self.own_weight += float(own_T.sum())
        self.own_top += float((((own_T == top_T) & (top_T > 0)).double() / ties_T).sum())
        self.chance += len(own_T) / candidates

    def add(self, other: Sums) -> None:
        """Add the sums of other tokens."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def shares(self) -> list[float]:
        """Each expert's share of the weight; all 0 where nothing was routed."""
        return (self.weights_E / self.weights_E.sum().clamp_min(1e-30)).tolist()

    def measure(self) -> Entropy:
        """The entropies."""
        nats = max(self.entropy / self.tokens, 0.0) if self.tokens else math.nan
        return Entropy(nats, -sum(share * math.log(share) for share in self.shares() if share > 0) + 0.0)

    def compare(self) -> Agreement:
        """The agreement; all NaN where no token was counted."""
        count = self.own_tokens or math.nan
        return Agreement(self.own_top / count, self.own_weight / count, self.chance / count, self.own_tokens)


def layer_of(module: str) -> str:
    """`module` up to its first number, "model.layers.0" of "model.layers.0.mlp.up_proj"; all of it without one."""
    parts = module.split(".")
    numbered = [position for position, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[0] + 1]) if numbered else module


def kind_of(module: str) -> str:
    """The last part of a module's name, such as "q_proj"."""
    return module.rpartition(".")[2]


def layer_labels(layers: Sequence[str]) -> list[str]:
    """`layers` without what all of them start with: "0", "1", ... for a plain decoder."""
    prefixes = {layer.rpartition(".")[0] for layer in layers}
    return [layer.rpartition(".")[2] for layer in layers] if len(prefixes) == 1 else list(layers)


def by_row(module: ModuleTrace) -> tuple[torch.Tensor, torch.Tensor]:
    """Index and weights as (B, S, K); tokens in one dimension are cut into the rows of the inputs, or are one row."""
    index, weights = module.top_k_index, module.top_k_weights
    ids = module.inputs.input_ids if module.inputs is not None else None
    if index.dim() <= 2:
        rows = ids.shape[0] if ids is not None and ids.numel() == index.shape[:-1].numel() else 1
        return index.reshape(rows, -1, index.shape[-1]), weights.reshape(rows, -1, weights.shape[-1])
    return index.flatten(1, -2), weights.flatten(1, -2)


def counted_tokens(inputs: TokenInputs | None, shape: tuple[int, int]) -> torch.Tensor:
    """Which of a module's tokens (B, S) count, bool: not padding, and not after the end of the row's text.

    The mask of a decoding step covers the cached tokens too, so its end is taken. Where the tokens are not known, all
    of the module's count.
    """
    kept = torch.ones(shape, dtype=torch.bool)
    if inputs is None:
        return kept
    mask = inputs.attention_mask
    if mask is not None and mask[:, -shape[1] :].shape == shape:
        kept &= mask[:, -shape[1] :].bool()
    if inputs.ended is not None and len(inputs.ended) == shape[0]:
        kept &= ~inputs.ended[:, None]
    return kept


def task_of_rows(inputs: TokenInputs | None, rows: int) -> list[str | None]:
    """The task of each of the module's rows, None where it has none."""
    tasks = inputs.tasks if inputs is not None else None
    if not tasks or rows % len(tasks):
        return [None] * rows
    return [tasks[row * len(tasks) // rows] for row in range(rows)]


def all_sums(trace: RoutingTrace, own_experts: Mapping[str, str] | None = None) -> dict[tuple, Sums]:
    """(task or None, module) -> its sums, over all calls.

    Raises:
        ValueError: an own expert that is not in the trace.
    """
    own = own_positions(trace.expert_names, own_experts)
    found: dict[tuple, Sums] = {}
    for step in trace.steps:
        for name, module in step.modules.items():
            for task, index_TK, weights_TK in _tokens_by_task(module):
                sums = found.setdefault((task, name), Sums(len(trace.expert_names)))
                position = own.get(task) if own.get(task) in module.candidates else None
                sums.count(index_TK, weights_TK, position, len(module.candidates))
    return found


def own_positions(expert_names: Sequence[str], own_experts: Mapping[str, str] | None) -> dict[str, int]:
    """Task -> position of its own expert; by default of the tasks that are called as an expert is.

    Raises:
        ValueError: an expert that is not among the names.
    """
    if own_experts is None:
        return {name: position for position, name in enumerate(expert_names)}
    for task, expert in own_experts.items():
        if expert not in expert_names:
            raise ValueError(f"own_experts[{task!r}]={expert!r} is no expert; experts are {list(expert_names)}.")
    return {task: expert_names.index(expert) for task, expert in own_experts.items()}


def _tokens_by_task(module: ModuleTrace) -> Iterator[tuple[str | None, torch.Tensor, torch.Tensor]]:
    index_BSK, weights_BSK = by_row(module)
    kept_BS = counted_tokens(module.inputs, tuple(index_BSK.shape[:2]))
    tasks = task_of_rows(module.inputs, len(index_BSK))
    for task in dict.fromkeys(tasks):
        chosen_BS = kept_BS & torch.tensor([each == task for each in tasks])[:, None]
        yield task, index_BSK[chosen_BS], weights_BSK[chosen_BS]


def grouped(sums: Mapping[tuple, Sums], group: Callable[[str | None, str], str | None]) -> dict[str, Sums]:
    """Sums added up by `group`, (task, module) -> the group's name; None leaves out."""
    found: dict[str, Sums] = {}
    for (task, module), one in sums.items():
        name = group(task, module)
        if name is not None:
            found.setdefault(name, Sums(len(one.weights_E))).add(one)
    return found


def grouping(by: str) -> Callable[[str | None, str], str | None]:
    """The group of a task and a module.

    Raises:
        ValueError: `by` is none of `GROUPINGS`.
    """
    if by not in GROUPINGS:
        raise ValueError(f"by={by!r} is unknown; allowed are {', '.join(map(repr, GROUPINGS))}.")
    groups: dict[str, Callable] = {
        "all": lambda task, module: "all",
        "task": lambda task, module: task,
        "layer": lambda task, module: layer_of(module),
        "kind": lambda task, module: kind_of(module),
        "module": lambda task, module: module,
    }
    return groups[by]


def routing_shares(trace: RoutingTrace, by: str = "layer") -> dict[str, list[float]]:
    """Each expert's share of the routing weight, per group; see `RoutingTrace.shares`."""
    return {name: sums.shares() for name, sums in grouped(all_sums(trace), grouping(by)).items()}


def routing_entropy(trace: RoutingTrace, by: str = "layer") -> dict[str, Entropy]:
    """Entropies per group; see `RoutingTrace.entropy`."""
    return {name: sums.measure() for name, sums in grouped(all_sums(trace), grouping(by)).items()}


def routing_agreement(
    trace: RoutingTrace, own_experts: Mapping[str, str] | None = None, by: str = "all"
) -> dict[str, Agreement]:
    """Agreement with the tasks' own experts per group, where tokens were counted; see `RoutingTrace.agreement`."""
    found = grouped(all_sums(trace, own_experts), grouping(by))
    return {name: sums.compare() for name, sums in found.items() if sums.own_tokens}


def span_of_layers(modules: Iterable[str], groups: int = 6) -> dict[str, str]:
    """Module -> the label of its span of layers, at most `groups` of about equal size: "0-4" or "12"."""
    names = list(dict.fromkeys(modules))
    layers = list(dict.fromkeys(map(layer_of, names)))
    labels, size = layer_labels(layers), -(-len(layers) // groups) or 1
    spans = {}
    for start in range(0, len(layers), size):
        last = min(start + size, len(layers)) - 1
        span = labels[start] if last == start else f"{labels[start]}-{labels[last]}"
        spans |= dict.fromkeys(layers[start : last + 1], span)
    return {name: spans[layer_of(name)] for name in names}
