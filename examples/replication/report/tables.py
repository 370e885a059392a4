"""The results as Markdown tables, ours beside the paper's, each seed beside the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import paper
from .claims import ABSENT, CLAIMS, HELD, OPEN, REVERSED


Seeds = Mapping[int, Mapping[str, Any]]  # seed -> its results
KINDS = {
    "private": "Private",
    "mbc": "MBC",
    "random": "Random tasks",
    "random_examples": "Random examples",
    "embedding": "Embeddings",
    "poly": "Poly",
}
ROUTINGS = {
    "uniform-parameter": "uniform",
    "arrow-parameter": "Arrow",
    "uniform": "uniform, output space",
    "arrow": "Arrow, output space",
    "arrow-calibrated": "Arrow calibrated, output space",
    "random": "random routing",
    "oracle": "oracle",
}
NAMES = {"base": "Base", "shared": "Shared"} | {
    f"{kind}/{way}": f"{library}, {routing}" for kind, library in KINDS.items() for way, routing in ROUTINGS.items()
}
# Of the libraries that the paper's Table 1 lacks, the ways that it has of others.
BESIDE = tuple(
    f"{kind}/{way}-parameter" for kind in ("random", "random_examples", "embedding") for way in ("uniform", "arrow")
)
WAYS = {
    "base": "Base (zero-shot)",
    "scratch": "No library: from scratch",
    "shared": "Shared, continued",
    "private-mean": "Private, mean",
    "mbc-mean": "MBC, mean",
    "mbc-arrow": "MBC, Arrow-initialised (not in the paper)",
    "mbc-poly": "MBC, poly",
    "random-poly": "Random tasks, poly",
    "mbc-polyz": "MBC, polyz",
    "mbc-lorahub": "MBC, LoraHub",
}
LIBRARIES = {
    "private": "44 private experts",
    "mbc": "11 MBC experts",
    "random": "11 random groups of tasks",
    "random_examples": "11 random shares of the rows",
    "embedding": "11 groups of tasks of near hidden states",
    "poly": "44 mixtures of 8 Poly skills",
}
SUITES = {
    "upstream": "the 44 training tasks' eval rows, loss",
    "sni": "12 held-out tasks, loss",
    "generated": "12 held-out tasks, Rouge-L",
    "benchmarks": "8 benchmarks, accuracy",
    "answers": "8 benchmarks, loss of the right answer",
    "adapted:0.1": "12 held-out tasks, 10 % of the data, loss",
    "adapted:1.0": "12 held-out tasks, all data, loss",
}
MARKS = {HELD: "✓", REVERSED: "✗", OPEN: "open", ABSENT: "not run"}
MISSING = "–"
NOT_RUN = "Not run yet."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others numbers."""
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def interval(told: dict | None, digits: int = 2, factor: float = 1.0) -> str:
    """`1.23 [1.10, 1.35]`, or a dash."""
    if not told:
        return MISSING
    mean, low, high = (round(told[key] * factor, digits) + 0.0 for key in ("mean", "low", "high"))
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def method(results: Mapping[str, Any], name: str, suite: str) -> dict | None:
    """A method's estimate on a suite, if it was judged there."""
    return results["methods"].get(name, {}).get(suite)


def per_seed(seeds: Seeds, shown: str) -> list[str]:
    """A column's head for each seed."""
    return [f"{shown}, seed {seed}" for seed in seeds]


def counts(estimates: Sequence[dict | None]) -> str:
    """Tasks and items of what was judged; once, where they are the same with every seed."""
    found = [f"{told['tasks']} / {told['items']}" for told in estimates if told]
    return "; ".join(dict.fromkeys(found)) or MISSING


def means(estimates: Sequence[dict | None]) -> str:
    """The mean with each seed, or one dash for all."""
    shown = [f"{told['mean']:.2f}" if told else MISSING for told in estimates]
    return ", ".join(shown) if any(estimates) else MISSING


def claims(seeds: Seeds) -> str:
    """Every claim of the paper with our verdicts."""
    known = [{(told["claim"], told["suite"]): told for told in results["claims"]} for results in seeds.values()]
    rows = []
    for claim, suite in ((claim.text, claim.suite) for claim in CLAIMS):
        is_share, cells = suite in ("benchmarks", "generated"), []
        parts = [one.get((claim, suite), {"verdict": ABSENT}) for one in known]
        for told in parts:
            near = f"; near is within {told['near'] * (100 if is_share else 1):.2f}" if "near" in told else ""
            shown = interval(told.get("gain"), 1 if is_share else 3, 100 if is_share else 1)
            cells += [MARKS[told["verdict"]], shown + near]
        count = counts([told.get("gain") for told in parts])
        rows.append([claim, SUITES[suite], *cells, count])
    heads = [head for seed in seeds for head in (f"seed {seed}", "how much better (points, or nats less)")]
    return table(["claim", "judged on", *heads, "tasks / items"], rows)


def summary(seeds: Seeds) -> str:
    """The shortest table: each library on its own tasks and on held-out ones, in output space, a mean a seed."""
    rows, columns = [], ("uniform", "arrow", "arrow-calibrated", "oracle")
    for suite, shown in (("upstream", "their own tasks"), ("sni", "held-out tasks")):
        for kind, name in LIBRARIES.items():
            ways = ["base", "shared", *(f"{kind}/{way}" for way in columns)]
            found = [[method(results, way, suite) for results in seeds.values()] for way in ways]
            if any(any(cell) for cell in found[2:]):
                rows.append([f"{name}, {shown}", *map(means, found)])
    head = ["loss", "base", "one shared LoRA", "uniform", "Arrow", "Arrow, calibrated", "told the task"]
    return table(head, rows)


def zero_shot(seeds: Seeds) -> str:
    """Accuracy on the eight benchmarks in the layout of the paper's Table 1, ours above the paper's."""
    rows = []
    for name in (name for name in NAMES if name in (*paper.ZERO_SHOT["Phi-2"], *BESIDE)):
        for seed, results in seeds.items():
            told = method(results, name, "benchmarks")
            if told and (name != "base" or seed == min(seeds)):
                cells = [f"{100 * told['by_task'].get(task, float('nan')):.1f}" for task in paper.BENCHMARKS]
                loss = interval(method(results, name, "answers"))
                which = MISSING if name == "base" else str(seed)
                rows.append(["ours", NAMES[name], *cells, interval(told, 1, 100), loss, f"{which} / {told['items']}"])
    for model, methods in paper.ZERO_SHOT.items():
        for name, values in methods.items():
            mean = sum(values) / len(values)
            rows.append([model, NAMES[name], *(f"{value:.1f}" for value in values), f"{mean:.1f}", MISSING, MISSING])
    head = ["model", "library, routing", *paper.SHOWN, "mean", "loss of the right answer", "seed / items"]
    return table(head, rows)


def code(seeds: Seeds) -> str:
    """Programs whose tests pass, in percent, beside the paper's."""
    rows = []
    for name in (name for name in NAMES if name in paper.CODE["Phi-2"]):
        for seed, results in seeds.items():
            if told := method(results, name, "code"):
                cells = [f"{100 * told['by_task'].get(task, float('nan')):.1f}" for task in paper.CODE_TASKS]
                rows.append(["ours", NAMES[name], *cells, f"{seed} / {told['items']}"])
    if not rows:
        return NOT_RUN
    for model, told in paper.CODE.items():
        rows += [[model, NAMES[name], *map(str, values), MISSING] for name, values in told.items()]
    return table(["model", "library, routing", *paper.CODE_TASKS.values(), "seed / items"], rows)


def held_out(seeds: Seeds) -> str:
    """Zero-shot on the held-out tasks: our loss, beside the paper's Rouge-L on its own 12."""
    rows = []
    for name, shown in NAMES.items():
        found = [method(results, name, "sni") for results in seeds.values()]
        if any(found):
            sides = [means([method(results, name, side) for results in seeds.values()]) for side in ("near", "far")]
            written = [interval(method(results, name, "generated"), 1, 100) for results in seeds.values()]
            beside = [str(paper.SNI[model].get(name, MISSING)) for model in paper.SNI]
            rows.append([shown, *map(interval, found), *sides, counts(found), *written, *beside])
    head = ["library, routing", *per_seed(seeds, "loss"), "near tasks", "far tasks", "tasks / items"]
    head += per_seed(seeds, "Rouge-L")
    return table([*head, *(f"Rouge-L, {model}" for model in paper.SNI)], rows)


def upstream(seeds: Seeds) -> str:
    """The training tasks' own eval rows."""
    rows = []
    for name, shown in NAMES.items():
        found = [method(results, name, "upstream") for results in seeds.values()]
        if any(found):
            beside = str(paper.UPSTREAM.get(name, MISSING))
            rows.append([shown, *map(interval, found), counts(found), beside])
    return table(["library, routing", *per_seed(seeds, "loss"), "tasks / items", "Rouge-L, Phi-2"], rows)


def supervised(seeds: Seeds) -> str:
    """Held-out tasks after adaptation."""
    rows = []
    for way, shown in WAYS.items():
        told = [results["supervised"].get(way, {}) for results in seeds.values()]
        less, more = ([one.get(share) or one.get("0") for one in told] for share in ("0.1", "1.0"))
        if any(told):
            beside = [str(value) for value in paper.SUPERVISED.get(way, (MISSING, MISSING))]
            cells = map(interval, [*less, *more])
            rows.append([shown, *cells, counts([*less, *more]), *beside])
    head = ["start", *per_seed(seeds, "loss, 10 %"), *per_seed(seeds, "100 %"), "tasks / items"]
    return table([*head, "Rouge-L, 10 %", "Rouge-L, 100 %"], rows)
