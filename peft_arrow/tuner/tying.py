"""Which modules share an input and can decide together."""

from __future__ import annotations

from collections.abc import Mapping


SHARED_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
# Cross-attention takes queries from one sequence, and keys and values from another.
CROSS = ("encdec", "encoder_attn", "crossattention", "cross_attn", "multihead_attn")


def tied_groups(in_features: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """module -> all modules of its group, itself among them; modules without peers are left out.

    Args:
        in_features (`Mapping[str, int]`): of the modules, by name.
    """
    groups: dict[tuple, list[str]] = {}
    for name, width in in_features.items():
        parent, _, leaf = name.rpartition(".")
        family = next((family for family in SHARED_INPUT if leaf in family), None)
        if family is not None and not any(mark in parent.lower() for mark in CROSS):
            groups.setdefault((parent, family, width), []).append(name)
    return {name: tuple(group) for group in groups.values() if len(group) > 1 for name in group}
