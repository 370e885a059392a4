"""What the quickstart shows: tables in text and Markdown, two pictures, and a page of tokens."""

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..tuner.trace_report import draw_heat_map, layer_labels, new_figure, routing_shares
from .judge import encode
from .tasks import Row


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


def paired_difference(ours: Mapping[str, Mapping], other: Mapping[str, Mapping], draws: int = 2000) -> tuple:
    """Mean over tasks of the per-row loss of `ours` minus `other`, with a 95 % bootstrap interval over rows."""
    gaps = [[a - b for a, b in zip(ours[task]["row_losses"], other[task]["row_losses"], strict=True)] for task in ours]
    rng = random.Random(0)
    means = sorted(
        statistics.fmean(statistics.fmean(rng.choices(rows, k=len(rows))) for rows in gaps) for _ in range(draws)
    )
    center = statistics.fmean(statistics.fmean(rows) for rows in gaps)
    return center, means[round(0.025 * draws)], means[round(0.975 * draws) - 1]


def comparison_lines(methods: Scores) -> list[str]:
    """Arrow against every other method in loss, one line each."""
    lines = [
        "Arrow minus the other: row loss, mean over tasks, with a 95 % bootstrap over rows (below 0: Arrow is better)"
    ]
    for name, scores in methods.items():
        if name != "arrow":
            center, low, high = paired_difference(methods["arrow"], scores)
            lines.append(f"  {name:<9} {center:+.3f}  [{low:+.3f}, {high:+.3f}]")
    return lines


def explanation(result: Mapping) -> list[str]:
    """What the columns of the tables are."""
    settings, methods = result["settings"], result["methods"]
    items = len(next(iter(methods["base"].values()))["row_losses"])
    return [
        f"{items} held-out rows a task; no entity and no template of them is in a training row.",
        "uniform: every adapter with the same weight.",
        f"random: {settings['top_k']} random adapters for each token and layer (mean of {settings['seeds']} seeds, "
        "± standard deviation over seeds).",
        f"single: {result['best_single']!r} for everything, the adapter with the lowest mean loss on training rows.",
        f"arrow: Arrow routing between all adapters, top_k={settings['top_k']}.",
        "own: each task with its own adapter (oracle).",
    ]


def render_text(result: Mapping) -> str:
    """The tables and comparisons as plain text."""
    methods = result["methods"]
    tables = [text_table(measure.title, table_cells(methods, measure)) for measure in (LOSS, EXACT)]
    return "\n\n".join([*tables, "\n".join(explanation(result)), "\n".join(comparison_lines(methods))])


def render_markdown(result: Mapping) -> str:
    """The same as Markdown."""
    methods = result["methods"]
    tables = [markdown_table(measure.title, table_cells(methods, measure)) for measure in (LOSS, EXACT)]
    comparison = "```\n" + "\n".join(comparison_lines(methods)) + "\n```"
    return "\n\n".join([*tables, "\n".join(f"- {line}" for line in explanation(result)), comparison])


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


def draw_by_task(shares: Mapping[str, Mapping[str, list]], experts: Sequence[str], path: Path) -> None:
    """Tasks down, experts across: the share of the routing weight, averaged over layers."""
    means = [[statistics.fmean(column) for column in zip(*layers.values(), strict=True)] for layers in shares.values()]
    draw_heat_map(
        means,
        path,
        title="Where the tokens of each task went:\nrouting weight in %, mean over layers",
        columns=("expert (adapter)", experts),
        rows=("task of the tokens", list(shares)),
        annotate=True,
    )


def draw_by_layer(shares: Mapping[str, Mapping[str, list]], experts: Sequence[str], path: Path) -> None:
    """One heat map a task: layers across, experts down; a task's own expert is framed."""
    across = min(3, len(shares))
    down = -(-len(shares) // across)
    figure = new_figure(1.5 + 3.9 * across, 1.0 + (0.9 + 0.2 * len(experts)) * down)
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    image, top = None, max(share for layers in shares.values() for column in layers.values() for share in column)
    for axes, (task, layers) in zip(grid.flat, shares.items(), strict=False):
        values = [list(column) for column in zip(*layers.values(), strict=True)]
        image = axes.imshow(values, cmap="Blues", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
        axes.set_title(f"tokens of: {task}", fontsize=10)
        axes.set_yticks(range(len(experts)), experts, fontsize=8)
        labels = layer_labels(list(layers))
        ticks = range(0, len(labels), max(1, len(labels) // 6))
        axes.set_xticks(ticks, [labels[tick] for tick in ticks], fontsize=8)
        if task in experts:
            row = list(experts).index(task)
            axes.axhspan(row - 0.5, row + 0.5, fill=False, edgecolor="tab:red", linewidth=1.5)
    for position, axes in enumerate(grid.flat):
        axes.set_visible(position < len(shares))
        axes.tick_params(labelbottom=position + across >= len(shares))
    figure.supxlabel("layer")
    figure.supylabel("expert (adapter)")
    figure.suptitle("Share of the routing weight of each expert in each layer (red frame: the task's own adapter)")
    figure.colorbar(image, ax=grid, shrink=0.6, format=lambda value, _: f"{100 * value:.0f} %")
    figure.savefig(path, dpi=110)


def task_shares(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows_of: Mapping[str, Sequence[Row]]
) -> dict[str, dict[str, list]]:
    """For each task, layer -> share of each expert, over all tokens of its rows."""
    shares = {}
    for task, rows in tqdm(rows_of.items(), desc="drawing", unit="task"):
        with model.trace_routing() as trace:
            model(**encode(tokenizer, rows)[0], logits_to_keep=1)
        shares[task] = routing_shares(trace)
    return shares
