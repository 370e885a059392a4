"""The ways to use a library that are judged, in groups; the names are those of the tables."""

from __future__ import annotations

from typing import Any

from .setting import kind_and_seed


CORE = {
    "uniform": "uniform",
    "uniform-parameter": "uniform_parameter",
    "arrow": "arrow",
    "arrow-parameter": {"router": "arrow", "aggregation": "parameter"},
    "random": {"router": "random", "seed": 0},
    "oracle": "oracle",
}
# PHATGOOSE is opt-in (group `phatgoose`): its gates take hundreds of steps an expert.
ROUTERS = {
    "spectr": {"router": "spectr"},
    "norm": {"router": "norm"},
    "lag": {"router": "lag"},
    "centroid": {"router": "centroid"},
    "task_predictor": {"router": "task_predictor"},
    "retrieval": {"router": "retrieval"},
}
PHATGOOSE = {"phatgoose": {"router": "phatgoose", "top_k": 2}}  # its paper's two experts
# Each is one change of plain Arrow, but for the last four. Our own idea is `calibrated-all`: standardised logits make
# experts comparable, so that nothing has to be cut off, and an average over all keeps what a wrong choice would lose.
CANDIDATES = {
    "arrow-calibrated": {"router": "arrow", "calibrated": True},
    "arrow-sequence": {"router": "arrow", "granularity": "sequence"},
    "arrow-tied": {"router": "arrow", "tied": True},
    "arrow-temperature-4": {"router": "arrow", "router_temperature": 4.0},
    "arrow-top-1": {"router": "arrow", "top_k": 1},
    "arrow-all": {"router": "arrow", "top_k": 64},
    "calibrated-null": {"router": "arrow", "calibrated": True, "null_expert": 1.0},
    "calibrated-parameter": {"router": "arrow", "calibrated": True, "aggregation": "parameter"},
    "calibrated-norm": {"router": "norm", "calibrated": True},
    "calibrated-all": {"router": "arrow", "calibrated": True, "top_k": 64},
}
# Over experts whose factors were rewritten as U sqrt(S) and sqrt(S) V^T; in output space that changes nothing.
CANONICAL = {"canonical-parameter": {"router": "arrow", "aggregation": "parameter"}}
# Answers are written and compared by Rouge-L, the paper's measure on held-out tasks; in its Table 5 these ways are.
GENERATED = {name: CORE[name] for name in ("uniform-parameter", "arrow-parameter")}
# HumanEval and MBPP, opt-in (group `code`): what is written is run, in a sandbox.
CODE = GENERATED
GROUPS: dict[str, dict[str, Any]] = {
    "core": CORE,
    "routers": ROUTERS,
    "phatgoose": PHATGOOSE,
    "candidates": CANDIDATES,
    "canonical": CANONICAL,
    "generated": GENERATED,
    "code": CODE,
}
WITH_BASE = ("core", "generated", "code")
WRITTEN = ("generated", "code")
NEED_DATA = ("routers", "phatgoose")
# Kinds of library of which no expert is a task's own: there is no oracle, and no routing that is right.
WITHOUT_OWN = ("shared", "random_examples")


def methods_of(group: str, library: str) -> list[Any]:
    """The methods of a group as `evaluate_library` takes them.

    The shared library has one expert and no routing; the base alone is judged beside the private library.
    """
    if group in WITH_BASE and library.startswith("shared"):
        return [{"experts": "shared", "name": "shared"}]
    ways = dict(GROUPS[group])
    if not has_own(library):
        ways.pop("oracle", None)
    first = ["base"] if group in WITH_BASE and kind_and_seed(library)[0] == "private" else []
    return first + [{**way, "name": name} if isinstance(way, dict) else way for name, way in ways.items()]


def has_own(library: str) -> bool:
    """Whether each task has an expert of its own in a library such as `mbc-0`."""
    return kind_and_seed(library)[0] not in WITHOUT_OWN
