"""What the numbers come from, what to choose, and what it costs, as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import paper
from .tables import MISSING, NOT_RUN, Seeds, counts, interval, means, method, table


def first_with(seeds: Seeds, key: str) -> Mapping[str, Any] | None:
    """The first seed's results that hold something under a key."""
    return next((results for results in seeds.values() if results[key]), None)


def beyond(seeds: Seeds, library: str) -> str:
    """Candidates on the choosing tasks of the first seed, and on the reporting ones of every seed."""
    known = {seed: results["beyond"][library] for seed, results in seeds.items() if library in results["beyond"]}
    if not known:
        return NOT_RUN
    first, told = next(iter(known.items()))
    best, rows = (told["winner"], told["winner_without_rows"]), []
    by_name = {seed: {row["name"]: row for row in one["rows"]} for seed, one in known.items()}
    for name in dict.fromkeys(name for part in by_name.values() for name in part):
        parts = [part.get(name, {}) for part in by_name.values()]
        cells = [interval(parts[0].get(key)) for key in ("choosing", "reporting")]
        cells += [interval(part.get(gain), 3) for part in parts for gain in ("reporting_gain", "held_out_gain")]
        shown = f"{name} †" if any(part.get("needs_rows") for part in parts) else name
        rows.append([f"**{shown}**" if name in best else shown, *cells])
    sizes = told["tasks"]
    head = ["router and options", f"loss, choosing ({sizes['choosing']} tasks), seed {first}"]
    head += [f"loss, reporting ({sizes['reporting']} tasks), seed {first}"]
    for seed in known:
        head += [f"less than plain Arrow, reporting, seed {seed}", f"of these, {sizes['held_out']} held-out tasks"]
    return table(head, rows)


def similarity(seeds: Seeds) -> str:
    """Mean cosine between the experts of each library."""
    rows = [
        [library, str(told["experts"]), f"{told['delta']:.3f}", f"{told['factors']:.3f}"]
        + [str(paper.COSINES.get(library.rpartition("-")[0], MISSING))]
        for library, told in sorted(each(seeds, "similarity").items())
    ]
    return table(["library", "experts", "mean cosine, updates", "numbers of A and B", "Phi-2, 10 clusters"], rows)


def each(seeds: Seeds, key: str) -> dict[str, Any]:
    """Library -> what is told of it, of all seeds."""
    return {library: told for results in seeds.values() for library, told in results[key].items()}


def transfer(seeds: Seeds) -> str:
    """Pearson's correlation of two adapters' cosine with what joint training gains."""
    rows = []
    for seed, results in seeds.items():
        for key, shown in (("delta", "the updates"), ("factors", "the numbers of A and B")):
            if results["transfer"]:
                told = results["transfer"][key]
                rows.append([f"cosine of {shown}, seed {seed}", interval(told), str(told["pairs"])])
    if not rows:
        return NOT_RUN
    rows += [[f"the paper's, {model}", f"{value:.2f}", MISSING] for model, value in paper.TRANSFER.items()]
    return table(["similarity", "correlation with the gain", "pairs"], rows)


def partition(seeds: Seeds) -> str:
    """The clusters of the first seed, and how far all seeds' are the categories."""
    results, told = first_with(seeds, "partitions"), each(seeds, "partitions")
    if results is None:
        return NOT_RUN
    category, rows = results["categories"], []
    for name, tasks in next(iter(told.values()))["groups"].items():
        kinds = [category[task] for task in tasks]
        found = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        rows.append([name, str(len(tasks)), found])
    rand = ", ".join(f"{library} {one['rand']:.2f}" for library, one in told.items())
    shown = table(["cluster", "tasks", "of which category"], rows)
    return f"{shown}\n\nAdjusted Rand index with the categories: {rand}."


def clusters(seeds: Seeds) -> str:
    """Losses by number of clusters, above the paper's."""
    rows = [
        [f"seed {seed}", str(row["clusters"]), *(interval(row.get(name)) for name in ("told", "uniform", "held_out"))]
        for seed, results in seeds.items()
        for row in results["clusters"]
    ]
    if not rows:
        return NOT_RUN
    for count, (likelihood, accuracy) in paper.CLUSTERS.items():
        rows.append(["Phi-2", str(count), MISSING, f"{-likelihood:.2f}", f"{accuracy:.1f} %"])
    head = ["", "clusters", "training tasks, own expert", "training tasks, uniform", "held-out, uniform"]
    return table(head, rows)


def routing(seeds: Seeds) -> str:
    """How often a token goes to its own task's expert, and how many experts share it."""
    rows = []
    for library, routers in sorted(each(seeds, "routing").items()):
        for router, told in routers.items():
            one = told["all"]["all"]
            nats = [layer["nats"] for layer in told["entropy"].values()]
            spread = [layer["of_shares"] for layer in told["entropy"].values()]
            cells = [f"{100 * one[key]:.1f} %" for key in ("top", "weight", "chance")]
            means = [f"{sum(numbers) / len(numbers):.2f}" for numbers in (nats, spread)]
            rows.append([library, router, *cells, *means, f"{one['tokens']:,}"])
    head = ["library", "router", "own expert first", "weight on it", "chance", "entropy of a token (nats)"]
    return table([*head, "entropy of the shares", "tokens x modules"], rows) if rows else NOT_RUN


def routing_errors(seeds: Seeds, kind: str) -> str:
    """Where Arrow errs most, with the first seed."""
    told = next((one for name, one in each(seeds, "routing").items() if name.rpartition("-")[0] == kind), None)
    if told is None:
        return NOT_RUN
    rows = [
        [row["task"], f"{100 * row['own_share']:.1f} %", row["expert"], f"{100 * row['share']:.1f} %"]
        + ["yes" if row["same_category"] else "no"]
        for row in told["arrow"]["errors"]
    ]
    return table(["task", "weight on its own expert", "largest other", "its weight", "same category"], rows)


def budget(files: Mapping[str, Mapping[str, Any]]) -> str:
    """One shared LoRA against private experts, for few tasks and different budgets.

    Args:
        files (`Mapping[str, Mapping]`): names such as `budget-80-0`, which ends in the seed -> results.
    """
    ways = ["base", "shared", "private/uniform", "private/arrow", "private/calibrated-norm", "private/oracle"]
    rows = []
    for suite, shown in (("upstream", "their own tasks"), ("sni", "held-out tasks")):
        for name, results in sorted(files.items(), key=lambda item: item[1]["config"]["training"]["steps"]):
            found = [method(results, way, suite) for way in ways]
            lead = [interval(told.get(suite)) for told in (results["shared_lead"].get(way, {}) for way in ways[3:5])]
            seed, steps = name.rpartition("-")[2], results["config"]["training"]["steps"]
            cells = [*(means([one]) for one in found), *lead, f"{seed} / {counts(found)}"]
            rows += [[shown, str(steps), *cells]] if any(found) else []
    if not rows:
        return NOT_RUN
    head = ["judged on", "steps a task", "base", "one shared LoRA", "uniform", "Arrow", "calibrated norm"]
    head += ["told the task", "shared better than Arrow by", "than calibrated norm by", "seed / tasks / items"]
    return table(head, rows)


def costs(seeds: Seeds) -> str:
    """Tokens, time and memory of every stage."""
    rows = []
    for seed, results in seeds.items():
        for stage, told in results["costs"].items():
            numbers = [f"{told[key]:,}" if key in told else MISSING for key in ("experts", "steps", "tokens")]
            rows.append([str(seed), stage, *numbers, f"{told['seconds'] / 60:,.1f}", f"{told['peak_mib']:,}"])
    return table(["seed", "stage", "experts", "steps", "tokens", "core minutes", "peak memory (MiB)"], rows)


def large(seeds: Seeds) -> str:
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
        for results in seeds.values()
        for told in results["large"]
    ]
    head = ["stage", "FLOPs here", "GFLOP/s here", "tokens, 256 tasks", "FLOPs, 7B", "A100 hours at 40 %"]
    return table(head, rows)
