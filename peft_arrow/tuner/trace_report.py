"""A routing trace as a table of plain text; nothing here runs a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from .trace_stats import Sums, all_sums, grouped, grouping, span_of_layers


if TYPE_CHECKING:
    from .trace import RoutingTrace

# Of the first column, which is as wide as its longest name.
NARROWEST, WIDEST = 28, 48
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
    prefix = {"by layer": "layer ", "by task": "task "}
    named = {prefix.get(title, "") + name: one for title, found in groups.items() for name, one in found.items()}
    width = min(WIDEST, max(NARROWEST, *(len(name) + 2 for name in (*named, *trace.expert_names))))
    lines = ["Share of the routing weight in percent, padding left out."]
    for title, columns in groups.items():
        lines += _shares(title, trace.expert_names, columns, width)
    return "\n".join([*lines, "", *_entropies(named, width), *_agreements(named, width)])


def _shares(title: str, experts: Sequence[str], columns: Mapping[str, Sums], width: int) -> list[str]:
    """Experts down, groups across; groups that do not fit beside the others follow below."""
    lines, waiting = [], {name: (max(6, len(name) + 1), sums.shares()) for name, sums in columns.items()}
    while waiting:
        taken, used = {}, width
        for name, (needed, _) in waiting.items():
            if taken and used + needed > LINE_WIDTH:
                break
            taken[name] = waiting[name]
            used += needed
        waiting = {name: column for name, column in waiting.items() if name not in taken}
        lines += ["", _line(title, ((name, needed) for name, (needed, _) in taken.items()), width)]
        for position, expert in enumerate(experts):
            cells = ((f"{100 * shares[position]:.1f}", needed) for needed, shares in taken.values())
            lines.append(_line(expert, cells, width))
    return lines


def _entropies(named: Mapping[str, Sums], width: int) -> list[str]:
    lines = [
        "Entropy H = -sum w ln w in nats, and exp(H), the number of experts with equal weights that has this entropy:",
        "of a token's weights (mean over tokens and modules), and of the shares (which experts are in use at all).",
        "",
        _line("", zip(("H of a token", "experts", "H of shares", "experts"), (14, 9, 14, 9)), width),
    ]
    for name, sums in named.items():
        found = sums.measure()
        values = (found.nats, found.experts, found.of_shares, found.experts_in_use)
        cells = zip((f"{value:.{digits}f}" for value, digits in zip(values, (3, 2, 3, 2))), (14, 9, 14, 9))
        lines.append(_line(name, cells, width))
    return lines


def _agreements(named: Mapping[str, Sums], width: int) -> list[str]:
    rows = [(name, sums.compare()) for name, sums in named.items() if sums.own_tokens]
    if not rows:
        return []
    lines = [
        "",
        "Agreement with the oracle, which sends a token to its own task's expert, in percent: the tokens whose top",
        "expert it is, the weight on it, and what both are by chance. A token counts once a module; modules that do",
        "not have this expert are left out.",
        "",
        _line("", zip(("top expert", "weight", "chance", "counted"), (14, 9, 9, 10)), width),
    ]
    for name, found in rows:
        shown = (*(f"{100 * share:.1f}" for share in (found.top, found.weight, found.chance)), str(found.tokens))
        lines.append(_line(name, zip(shown, (14, 9, 9, 10)), width))
    return lines


def _line(name: str, cells: Iterable[tuple[str, int]], width: int) -> str:
    """A name in `width` columns, and cells to the right in theirs."""
    shown = name if len(name) < width else f"{name[: width - 2]}\u2026"
    return shown.ljust(width) + "".join(text.rjust(needed) for text, needed in cells)
