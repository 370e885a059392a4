"""What the quickstart tells: clusters, tables in text and Markdown, answers, files, and what to do next."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..evaluation.statistics import paired_difference
from ..library.manifest import Evaluation
from .base import BASE_ID
from .settings import LIBRARY, WORK


Scores = Mapping[str, Mapping[str, Mapping]]


@dataclass(frozen=True)
class Measure:
    """One number of a score: its key, title, and how it is printed."""

    key: str
    title: str
    digits: str


LOSS = Measure("loss", "Completion loss on held-out rows (nats per token, lower is better)", ".2f")
EXACT = Measure("exact", "Exact match on held-out rows (share of rows, higher is better)", ".2f")


def mean_over_tasks(scores: Mapping[str, Mapping], key: str) -> float:
    """The mean of one measure, every task with the same weight."""
    return statistics.fmean(score[key] for score in scores.values())


def collect_random(methods: Scores) -> tuple[dict[str, dict], list[dict]]:
    """The methods with the runs `random-<seed>` averaged to one `random`; and those runs."""
    runs = [scores for name, scores in methods.items() if name.startswith("random-")]
    shown = {}
    for name, scores in methods.items():
        if not name.startswith("random-"):
            shown[name] = dict(scores)
        elif "random" not in shown:
            keys = ("loss", "exact")
            shown["random"] = {
                task: {key: statistics.fmean(run[task][key] for run in runs) for key in keys} for task in scores
            }
    return shown, runs


def table_cells(methods: Scores, measure: Measure) -> list[list[str]]:
    """Head, one line a task, and the mean over tasks; the random runs are one column with their spread in the mean."""
    shown, runs = collect_random(methods)
    tasks = list(next(iter(shown.values())))
    lines = [["task", *shown]]
    for task in tasks:
        lines.append([task, *(format(scores[task][measure.key], measure.digits) for scores in shown.values())])
    means = ["mean over tasks"]
    for name, scores in shown.items():
        mean = format(mean_over_tasks(scores, measure.key), measure.digits)
        spread = spread_over_seeds(runs, measure.key) if name == "random" else None
        means.append(mean if spread is None else f"{mean}±{spread:{measure.digits}}")
    return [*lines, means]


def spread_over_seeds(runs: Sequence[Mapping], key: str) -> float | None:
    """Standard deviation over the random seeds of the mean over tasks; None for fewer than two seeds."""
    return statistics.stdev(mean_over_tasks(run, key) for run in runs) if len(runs) > 1 else None


def text_table(title: str, cells: Sequence[Sequence[str]]) -> str:
    """`cells` in columns of fixed width: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        rest = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        lines.append("  ".join([line[0].ljust(widths[0]), *rest]).rstrip())
    rule = "-" * max(map(len, lines))
    return "\n".join([title, rule, lines[0], rule, *lines[1:-1], rule, lines[-1]])


def markdown_table(title: str, cells: Sequence[Sequence[str]]) -> str:
    """`cells` as a Markdown table under a heading."""
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    align = "|---|" + "---:|" * (len(cells[0]) - 1)
    return "\n".join([f"### {title}", "", lines[0], align, *lines[1:]])


def row_losses(scores: Mapping[str, Mapping]) -> dict[str, list[float]]:
    """Task -> the loss of each row."""
    return {task: score["row_losses"] for task, score in scores.items()}


def comparison_lines(methods: Scores) -> list[str]:
    """Arrow against every other method in loss, one line each."""
    lines = [
        "Arrow minus the other: row loss, mean over tasks, with a 95 % bootstrap over rows (below 0: Arrow is better)"
    ]
    for name, scores in methods.items():
        if name != "arrow":
            gap = paired_difference(row_losses(methods["arrow"]), row_losses(scores))
            lines.append(f"  {name:<13} {gap.mean:+.3f}  [{gap.low:+.3f}, {gap.high:+.3f}]")
    return lines


def explanation(result: Mapping) -> list[str]:
    """What the columns of the tables are, and how many steps each adapter was trained for."""
    settings, groups, steps = result["settings"], result["clusters"], result["steps"]
    items = len(next(iter(result["methods"]["base"].values()))["row_losses"])
    top_k, count, tasks = settings["top_k"], len(groups), sum(map(len, groups.values()))
    private = sorted({steps[task] for tasks in groups.values() for task in tasks})
    clusters = ", ".join(f"{cluster} {steps[cluster]}" for cluster in groups)
    return [
        f"{items} held-out rows a task; no entity and no template of them is in a training row.",
        f"{settings['steps']} optimizer steps a task: {' or '.join(map(str, private))} for its private adapter, the "
        f"others for the expert of its cluster, which has those of all its tasks: {clusters}.",
        "base: the model without adapters.",
        f"uniform: the clusters' experts ({count}), each with the same weight.",
        f"random: {min(top_k, count)} of the clusters' experts for each token and module, chosen and weighted at "
        f"random (mean of {settings['seeds']} seeds, ± standard deviation over seeds).",
        f"single: {result['best_single']!r} for everything, the cluster's expert with the lowest mean loss on "
        "training rows of all tasks.",
        f"arrow: Arrow routing between the clusters' experts, top_k={top_k}. This is the library that was saved.",
        "arrow_calibrated: the same, with scores standardised by what the base model writes (calibrate_router).",
        f"arrow_private: Arrow routing between the private adapters ({tasks}), top_k={top_k}.",
        "private_calibrated: the same, calibrated.",
        "own_cluster: each task with the expert of its cluster (oracle: it is told the task).",
        "own_private: each task with its own private adapter (oracle).",
    ]


def render_text(result: Mapping) -> str:
    """The clusters, the tables and comparisons as plain text."""
    methods, clusters = result["methods"], render_clusters(result["clusters"], result["silhouette"])
    tables = [text_table(measure.title, table_cells(methods, measure)) for measure in (LOSS, EXACT)]
    return "\n\n".join([clusters, *tables, "\n".join(explanation(result)), "\n".join(comparison_lines(methods))])


def render_markdown(result: Mapping) -> str:
    """The same as Markdown."""
    methods, clusters = result["methods"], render_clusters(result["clusters"], result["silhouette"])
    tables = [markdown_table(measure.title, table_cells(methods, measure)) for measure in (LOSS, EXACT)]
    comparison = "```\n" + "\n".join(comparison_lines(methods)) + "\n```"
    clusters = clusters.replace("\n  ", "\n- ").replace("\n", "\n\n", 1)
    return "\n\n".join([clusters, *tables, "\n".join(f"- {line}" for line in explanation(result)), comparison])


def render_answers(answers: Mapping[str, Mapping[str, str]]) -> str:
    """A mixed batch: prompt, what was expected, and the first line of what the routed model and the base wrote."""
    lines = ["One batch of prompts, answered by the routed model:"]
    for name, answer in answers.items():
        lines.append(f"\n[{name}] {answer['prompt'].strip()}")
        for key in ("expected", "arrow", "base"):
            if answer[key] or key != "expected":
                lines.append(f"  {key + ':':<10}{shorten(answer[key]) or '(nothing: it ended the text at once)'}")
    return "\n".join(lines)


def shorten(text: str, width: int = 90) -> str:
    """`text` on one line of at most `width` characters."""
    line = " \u21b5 ".join(text.strip().splitlines())
    return line if len(line) <= width else line[: width - 1] + "\u2026"


def render_all(result: Mapping, output: Path) -> str:
    """All that a run prints at its end; of adapters that were given there are no tables."""
    is_built = "methods" in result
    parts = [render_text(result)] if is_built else []
    parts += [render_answers(result["answers"]), render_files(output)]
    parts += [render_next(result["settings"]["base"], output)] if is_built else []
    return "\n\n".join([*parts, f"Took {result['seconds']:.0f} s."])


def render_clusters(groups: Mapping[str, Sequence[str]], silhouette: float | None) -> str:
    """Which tasks are in which cluster."""
    tasks = sum(map(len, groups.values()))
    clear = "" if silhouette is None else f" (silhouette {silhouette:.2f})"
    head = f"Clusters of the {tasks} private adapters by their weights{clear}, each with an expert of its own:"
    return "\n".join([head, *(f"  {cluster}: {', '.join(names)}" for cluster, names in groups.items())])


# How a card names the methods, where their columns' names need the lines under the table.
CARD_METHODS = {
    "base": "base model without adapters",
    "random": "random routing",
    "single": "best single expert",
    "arrow_calibrated": "arrow, calibrated",
    "arrow_private": "arrow over the private adapters",
    "private_calibrated": "arrow over the private adapters, calibrated",
    "own_cluster": "each task with its own expert (oracle)",
    "own_private": "each task with its private adapter (oracle)",
}


def evaluations(result: Mapping) -> list[Evaluation]:
    """The means of the tables and Arrow's loss on each task, for the library's card."""
    shown, _ = collect_random(result["methods"])
    kinds = {"loss": "completion loss in nats per token", "exact": "exact match"}
    figures = []
    for key, metric in kinds.items():
        for method, scores in shown.items():
            value, method = round(mean_over_tasks(scores, key), 4), CARD_METHODS.get(method, method)
            figures.append(Evaluation("mean over tasks", metric, value, split="held-out", method=method))
    for task, score in shown["arrow"].items():
        figures.append(Evaluation(task, kinds["loss"], round(score["loss"], 4), split="held-out", method="arrow"))
    return figures


def render_files(output: Path) -> str:
    """The files of a run that are there, each with what it is."""
    kinds = {
        f"{LIBRARY}/README.md": "the library's card",
        f"{WORK}/clustering/similarity.png": "how alike the private adapters are, and their clusters",
        f"{WORK}/clustering/map.png": "the same as a map",
        f"{WORK}/clustering/dendrogram.png": "the same as a tree",
        "experts_by_task.png": "which expert the tokens of each task went to",
        "experts_by_layer.png": "the same for each layer",
        "tokens.html": "the expert of each token",
        "report.md": "the tables",
        "report.txt": "the tables as text",
        "report.json": "all numbers",
    }
    found = {str(output / name): kind for name, kind in kinds.items() if (output / name).exists()}
    width = max(map(len, found))
    return "\n".join(["Written:", *(f"  {path:<{width}}  {kind}" for path, kind in found.items())])


def render_next(base: str | None, output: Path) -> str:
    """How to load the library and how to share it."""
    library = output / LIBRARY
    return (
        f'Load it:  ArrowLoraModel.from_pretrained("{base or BASE_ID}", "{library}")\n'
        f"Share it: peft-arrow push {library} you/name"
    )
