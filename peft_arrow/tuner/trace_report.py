"""A routing trace as a table of plain text; nothing here runs a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .trace_stats import Sums, all_sums, grouped, grouping, span_of_layers


if TYPE_CHECKING:
    from .trace import RoutingTrace

NAME_WIDTH = 28
LINE_WIDTH = 118


def routing_table(trace: RoutingTrace, own_experts: Mapping[str, str] | None = None) -> str:
    """Shares, entropy and agreement as text: over all, per kind of module, per span of layers, per task.

    Raises:
        ValueError: an own expert that is not in the trace.
    """
    sums = all_sums(trace, own_experts)
    if not sums:
        return "The trace holds no forward pass."
    spans = span_of_layers(module for _, module in sums)
    groups = {
        "by kind of module": grouped(sums, grouping("all")) | grouped(sums, grouping("kind")),
        "by layer": grouped(sums, lambda task, module: spans[module]),
        "by task": grouped(sums, grouping("task")),
    }
    lines = ["Share of the routing weight in percent, padding left out."]
    for title, columns in groups.items():
        lines += _shares(title, trace.expert_names, columns)
    lines += ["", *_entropies(groups), *_agreements(groups)]
    return "\n".join(lines)


def _shares(title: str, experts: Sequence[str], columns: Mapping[str, Sums]) -> list[str]:
    """Experts down, groups across; groups that do not fit beside the others follow below."""
    lines, waiting = [], {name: (max(6, len(name) + 1), sums.shares()) for name, sums in columns.items()}
    while waiting:
        taken, width = {}, NAME_WIDTH
        for name, (needed, _) in waiting.items():
            if taken and width + needed > LINE_WIDTH:
                break
            taken[name] = waiting[name]
            width += needed
        waiting = {name: column for name, column in waiting.items() if name not in taken}
        head = "".join(name.rjust(needed) for name, (needed, _) in taken.items())
        lines += ["", title.ljust(NAME_WIDTH) + head]
        for position, expert in enumerate(experts):
            cells = (f"{100 * shares[position]:.1f}".rjust(needed) for needed, shares in taken.values())
            lines.append(_name(expert) + "".join(cells))
    return lines


def _entropies(groups: Mapping[str, Mapping[str, Sums]]) -> list[str]:
    lines = [
        "Entropy H = -sum w ln w in nats, and exp(H), the number of experts with equal weights that has this entropy:",
        "of a token's weights (mean over tokens and modules), and of the shares (which experts are in use at all).",
        "",
        "".ljust(NAME_WIDTH)
        + "H of a token".rjust(14)
        + "experts".rjust(9)
        + "H of shares".rjust(14)
        + "experts".rjust(9),
    ]
    for name, sums in _all_of(groups):
        found = sums.measure()
        first = f"{found.nats:14.3f}{found.experts:9.2f}"
        lines.append(f"{_name(name)}{first}{found.of_shares:14.3f}{found.experts_in_use:9.2f}")
    return lines


def _agreements(groups: Mapping[str, Mapping[str, Sums]]) -> list[str]:
    rows = [(name, sums.compare()) for name, sums in _all_of(groups) if sums.own_tokens]
    if not rows:
        return []
    head = "".ljust(NAME_WIDTH) + "top expert".rjust(14) + "weight".rjust(9) + "chance".rjust(9) + "tokens".rjust(9)
    lines = [
        "",
        "Agreement with the oracle, which sends a token to its own task's expert, in percent: the tokens whose top",
        "expert it is, the weight on it, and what both are by chance. Modules without this expert are left out.",
        "",
        head,
    ]
    for name, found in rows:
        cells = f"{100 * found.top:14.1f}{100 * found.weight:9.1f}{100 * found.chance:9.1f}{found.tokens:9d}"
        lines.append(_name(name) + cells)
    return lines


def _all_of(groups: Mapping[str, Mapping[str, Sums]]) -> list[tuple[str, Sums]]:
    """Each group as a line: "all", kinds, "layer 0-4", "task dates"."""
    prefix = {"by layer": "layer ", "by task": "task "}
    return [(prefix.get(title, "") + name, sums) for title, found in groups.items() for name, sums in found.items()]


def _name(name: str) -> str:
    return (name if len(name) < NAME_WIDTH else f"{name[: NAME_WIDTH - 2]}\u2026").ljust(NAME_WIDTH)
