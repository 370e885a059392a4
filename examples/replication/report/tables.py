"""The results as Markdown tables, ours beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import paper
from .claims import ABSENT, HELD, OPEN, REVERSED


NAMES = {
    "base": "Base",
    "shared": "Shared",
    "private/uniform-parameter": "Private, uniform",
    "private/arrow-parameter": "Private, Arrow",
    "private/uniform": "Private, uniform, output space",
    "private/arrow": "Private, Arrow, output space",
    "private/arrow-calibrated": "Private, Arrow calibrated, output space",
    "private/random": "Private, random routing",
    "private/oracle": "Private, oracle",
    "mbc/uniform-parameter": "MBC, uniform",
    "mbc/arrow-parameter": "MBC, Arrow",
    "mbc/uniform": "MBC, uniform, output space",
    "mbc/arrow": "MBC, Arrow, output space",
    "mbc/arrow-calibrated": "MBC, Arrow calibrated, output space",
    "mbc/random": "MBC, random routing",
    "mbc/oracle": "MBC, oracle",
    "random/uniform-parameter": "Random tasks, uniform",
    "random/arrow-parameter": "Random tasks, Arrow",
    "random/uniform": "Random tasks, uniform, output space",
    "random/arrow": "Random tasks, Arrow, output space",
    "random/random": "Random tasks, random routing",
    "random/oracle": "Random tasks, oracle",
    "random_examples/uniform-parameter": "Random examples, uniform",
    "random_examples/arrow-parameter": "Random examples, Arrow",
    "random_examples/uniform": "Random examples, uniform, output space",
    "random_examples/arrow": "Random examples, Arrow, output space",
    "random_examples/random": "Random examples, random routing",
}
# Of the random libraries, the ways that the paper's Table 1 has of others.
BESIDE = tuple(f"{kind}/{way}-parameter" for kind in ("random", "random_examples") for way in ("uniform", "arrow"))
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
SUITES = {
    "upstream": "the 44 training tasks' eval rows, loss",
    "sni": "12 held-out tasks, loss",
    "benchmarks": "8 benchmarks, accuracy",
    "answers": "8 benchmarks, loss of the right answer",
    "adapted:0.1": "12 held-out tasks, 10 % of the data, loss",
    "adapted:1.0": "12 held-out tasks, all data, loss",
}
MARKS = {HELD: "✓", REVERSED: "✗", OPEN: "open", ABSENT: "not run"}
MISSING = "–"


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


def claims(results: dict) -> str:
    """Every claim of the paper with our verdict."""
    rows = []
    for told in results["claims"]:
        is_share, gain = told["suite"] == "benchmarks", told.get("gain")
        shown = interval(gain, 1 if is_share else 3, 100 if is_share else 1)
        near = f"; near is within {told['near'] * (100 if is_share else 1):.2f}" if "near" in told else ""
        counts = f"{told['seeds']} / {gain['tasks']} / {gain['items']}" if gain else MISSING
        rows.append([told["claim"], SUITES[told["suite"]], MARKS[told["verdict"]], shown + near, counts])
    head = ["claim", "judged on", "", "how much better (points, or nats less)", "seeds / tasks / items"]
    return table(head, rows)


def summary(results: dict) -> str:
    """The shortest table: each library on its own tasks and on held-out ones, in output space."""
    rows, columns = [], ("uniform", "arrow", "arrow-calibrated", "oracle")
    for suite, shown in (("upstream", "their own tasks"), ("sni", "held-out tasks")):
        beside = [results["methods"].get(name, {}).get(suite) for name in ("base", "shared")]
        for kind, name in (
            ("private", "44 private experts"),
            ("mbc", "11 MBC experts"),
            ("random", "11 random groups of tasks"),
            ("random_examples", "11 random shares of the rows"),
        ):
            cells = [results["methods"].get(f"{kind}/{way}", {}).get(suite) for way in columns]
            if any(cells):
                rows.append([f"{name}, {shown}", *map(interval, [*beside, *cells])])
    head = ["loss", "base", "one shared LoRA", "uniform", "Arrow", "Arrow, calibrated", "told the task"]
    return table(head, rows)


def zero_shot(results: dict) -> str:
    """Accuracy on the eight benchmarks in the layout of the paper's Table 1, ours above the paper's."""
    rows = []
    for name in NAMES:
        told = results["methods"].get(name, {}).get("benchmarks")
        if not told or name not in (*paper.ZERO_SHOT["Phi-2"], *BESIDE):
            continue
        cells = [f"{100 * told['by_task'].get(task, float('nan')):.1f}" for task in paper.BENCHMARKS]
        seeds = f"{results['methods'][name]['seeds']} / {told['items']}"
        loss = interval(results["methods"][name].get("answers"))
        rows.append(["ours", NAMES[name], *cells, interval(told, 1, 100), loss, seeds])
    for model, methods in paper.ZERO_SHOT.items():
        for name, values in methods.items():
            mean = sum(values) / len(values)
            rows.append([model, NAMES[name], *(f"{value:.1f}" for value in values), f"{mean:.1f}", MISSING, MISSING])
    head = ["model", "library, routing", *paper.SHOWN, "mean", "loss of the right answer", "seeds / items"]
    return table(head, rows)


def held_out(results: dict) -> str:
    """Zero-shot on the held-out tasks: our loss, beside the paper's Rouge-L on its own 12."""
    rows = []
    for name, shown in NAMES.items():
        told = results["methods"].get(name, {})
        if "sni" not in told:
            continue
        beside = [str(paper.SNI[model].get(name, MISSING)) for model in paper.SNI]
        sides = [f"{told[side]['mean']:.2f}" if side in told else MISSING for side in ("near", "far")]
        counts = f"{told['seeds']} / {told['sni']['tasks']} / {told['sni']['items']}"
        rows.append([shown, interval(told["sni"]), *sides, counts, *beside])
    head = ["library, routing", "loss", "near tasks", "far tasks", "seeds / tasks / items"]
    return table([*head, *(f"Rouge-L, {model}" for model in paper.SNI)], rows)


def upstream(results: dict) -> str:
    """The training tasks' own eval rows."""
    rows = []
    for name, shown in NAMES.items():
        told = results["methods"].get(name, {})
        if "upstream" in told:
            counts = f"{told['seeds']} / {told['upstream']['tasks']} / {told['upstream']['items']}"
            rows.append([shown, interval(told["upstream"]), counts, str(paper.UPSTREAM.get(name, MISSING))])
    return table(["library, routing", "loss", "seeds / tasks / items", "Rouge-L, Phi-2"], rows)


def supervised(results: dict) -> str:
    """Held-out tasks after adaptation."""
    rows = []
    for way, shown in WAYS.items():
        told = results["supervised"].get(way)
        if told is None:
            continue
        first = told.get("0.1") or told.get("0")
        counts = f"{first['tasks']} / {first['items']}" if first else MISSING
        beside = [str(value) for value in paper.SUPERVISED.get(way, (MISSING, MISSING))]
        rows.append([shown, interval(first), interval(told.get("1.0") or told.get("0")), counts, *beside])
    head = ["start", "loss, 10 %", "loss, 100 %", "tasks / items", "Rouge-L, 10 %", "Rouge-L, 100 %"]
    return table(head, rows)


def beyond(results: dict, library: str) -> str:
    """Candidates on the choosing and on the reporting split."""
    told = results["beyond"].get(library)
    if not told:
        return "Not run yet."
    best, rows = (told["winner"], told["winner_without_rows"]), []
    for row in told["rows"]:
        name = f"{row['name']} †" if row["needs_rows"] else row["name"]
        cells = [interval(row["choosing"]), interval(row["reporting"])]
        cells += [interval(row[gain], 3) for gain in ("reporting_gain", "held_out_gain")]
        rows.append([f"**{name}**" if row["name"] in best else name, *cells])
    counts = told["tasks"]
    head = ["router and options", f"loss, choosing ({counts['choosing']} tasks)"]
    head += [f"loss, reporting ({counts['reporting']} tasks)", "less than plain Arrow, reporting"]
    return table([*head, f"of these, {counts['held_out']} held-out tasks"], rows)


def similarity(results: dict) -> str:
    """Mean cosine between the experts of each library."""
    rows = [
        [library, str(told["experts"]), f"{told['delta']:.3f}", f"{told['factors']:.3f}"]
        + [str(paper.COSINES.get(library.rpartition("-")[0], MISSING))]
        for library, told in results["similarity"].items()
    ]
    return table(["library", "experts", "mean cosine, updates", "numbers of A and B", "Phi-2, 10 clusters"], rows)


def transfer(results: dict) -> str:
    """Pearson's correlation of two adapters' cosine with what joint training gains."""
    told = results["transfer"]
    if not told:
        return "Not run yet."
    rows = [
        [f"cosine of {shown}", interval(told[key]), str(told[key]["pairs"])]
        for key, shown in (("delta", "the updates"), ("factors", "the numbers of A and B"))
    ]
    rows += [[f"the paper's, {model}", f"{value:.2f}", MISSING] for model, value in paper.TRANSFER.items()]
    return table(["similarity", "correlation with the gain", "pairs"], rows)


def partition(results: dict) -> str:
    """The clusters of the first seed, and how far both seeds' are the categories."""
    if "mbc-0" not in results["partitions"]:
        return "Not run yet."
    category, told = results["categories"], results["partitions"]
    rows = []
    for name, tasks in told["mbc-0"]["groups"].items():
        kinds = [category[task] for task in tasks]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        rows.append([name, str(len(tasks)), counts])
    found = ", ".join(f"{library} {one['rand']:.2f}" for library, one in told.items())
    return (
        table(["cluster", "tasks", "of which category"], rows)
        + f"\n\nAdjusted Rand index with the categories: {found}."
    )


def clusters(results: dict) -> str:
    """Losses by number of clusters, above the paper's."""
    rows = [
        ["ours", str(row["clusters"]), *(interval(row.get(name)) for name in ("told", "uniform", "held_out"))]
        for row in results["clusters"]
    ]
    if not rows:
        return "Not run yet."
    for count, (likelihood, accuracy) in paper.CLUSTERS.items():
        rows.append(["Phi-2", str(count), MISSING, f"{-likelihood:.2f}", f"{accuracy:.1f} %"])
    head = ["", "clusters", "training tasks, own expert", "training tasks, uniform", "held-out, uniform"]
    return table(head, rows)


def routing(results: dict) -> str:
    """How often a token goes to its own task's expert, and how many experts share it."""
    rows = []
    for library, routers in results["routing"].items():
        for router, told in routers.items():
            one = told["all"]["all"]
            nats = [layer["nats"] for layer in told["entropy"].values()]
            spread = [layer["of_shares"] for layer in told["entropy"].values()]
            cells = [f"{100 * one[key]:.1f} %" for key in ("top", "weight", "chance")]
            means = [f"{sum(numbers) / len(numbers):.2f}" for numbers in (nats, spread)]
            rows.append([library, router, *cells, *means, f"{one['tokens']:,}"])
    head = ["library", "router", "own expert first", "weight on it", "chance", "entropy of a token (nats)"]
    return table([*head, "entropy of the shares", "tokens x modules"], rows) if rows else "Not run yet."


def routing_errors(results: dict, library: str) -> str:
    """Where Arrow errs most."""
    told = results["routing"].get(library, {}).get("arrow")
    if not told:
        return "Not run yet."
    rows = [
        [row["task"], f"{100 * row['own_share']:.1f} %", row["expert"], f"{100 * row['share']:.1f} %"]
        + ["yes" if row["same_category"] else "no"]
        for row in told["errors"]
    ]
    return table(["task", "weight on its own expert", "largest other", "its weight", "same category"], rows)


def costs(results: dict) -> str:
    """Tokens, time and memory of every stage."""
    rows = []
    for stage, told in results["costs"].items():
        numbers = [f"{told[key]:,}" if key in told else MISSING for key in ("experts", "steps", "tokens")]
        rows.append([stage, *numbers, f"{told['seconds'] / 60:,.1f}", f"{told['peak_mib']:,}"])
    return table(["stage", "experts", "steps", "tokens", "core minutes", "peak memory (MiB)"], rows)


def large(results: dict[str, Any]) -> str:
    """The same for 256 tasks on 7B."""
    rows = [
        [
            told["stage"],
            f"{told['flops']:.2e}",
            f"{told['rate'] / 1e9:,.0f}",
            f"{told['large_tokens'] / 1e6:,.1f} M",
            f"{told['large_flops']:.2e}",
            f"{told['large_hours']:,.2f}",
        ]
        for told in results["large"]
    ]
    head = ["stage", "FLOPs here", "GFLOP/s here", "tokens, 256 tasks", "FLOPs, 7B", "A100 hours at 40 %"]
    return table(head, rows)
