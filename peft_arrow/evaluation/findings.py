"""What to look at: computed, plain sentences on what is suspicious or easily overlooked in a report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .leaks import find_leaks, is_blind
from .shares import largest_change, mean_shares
from .statistics import paired_difference, task_mean
from .tables import plain, signed


if TYPE_CHECKING:
    from .report import EvaluationReport, MethodResult

NEARLY_ALL = 0.95
NO_CHANGE = 0.02
FEW_ROWS = 30
# Methods that do not look at the tokens, as everybody knows.
CONSTANT = ("uniform", "uniform_parameter", "random")
CONTROLS = {
    "base": "the base",
    "uniform": "uniform weights",
    "random": "random routing",
    "random_lora": "random LoRAs",
    "best_single": "the best single expert",
}
LOSS = "loss"


def what_to_look_at(report: EvaluationReport) -> list[str]:
    """All findings, the gravest first; one sentence that says so where there are none."""
    found = [
        *_leaks(report),
        *_repeated_rows(report),
        *_one_expert(report),
        *_constant(report),
        *_not_better(report),
        *_oracle(report),
        *_reading(report),
    ]
    return found or ["Nothing stands out."]


def _short(name: str) -> str:
    return name.rpartition("/")[2]


def _leaks(report: EvaluationReport) -> Iterator[str]:
    for label, library in report.data["libraries"].items():
        told = f"Library {label}: " if label else ""
        for leak in find_leaks(library["alone"], library["own"]) if library["alone"] else []:
            yield told + leak.told()
        if not library["alone"]:
            yield (
                f"{told}No rows for selection, so nothing can be said on whether an expert was trained on the judged "
                "rows; give rows with the split 'train', or selection=."
            )
        elif is_blind(library["alone"]):
            yield f"{told}There are too few rows to see whether an expert was trained on the judged ones."


def _repeated_rows(report: EvaluationReport) -> Iterator[str]:
    for name, task in report.data["tasks"].items():
        if task["repeated"]:
            yield f"{task['repeated']} of {task['rows']} judged rows of {name!r} are also among its rows for training."
    for label, library in report.data["libraries"].items():
        if library.get("fit_repeated"):
            told = f" of library {label}" if label else ""
            yield f"{library['fit_repeated']} judged rows are also among the rows that routers{told} were fitted on."


def _routed(report: EvaluationReport) -> Iterator[tuple[str, MethodResult]]:
    for name, method in report.methods.items():
        if method.kind == "routed" and method.shares():
            yield name, method


def _one_expert(report: EvaluationReport) -> Iterator[str]:
    for name, method in _routed(report):
        experts = report.data["libraries"][method.library]["experts"]
        if len(experts) == 1:
            continue
        means = mean_shares(list(method.shares().values()))
        top = max(range(len(means)), key=means.__getitem__)
        if means[top] > NEARLY_ALL:
            whom = f"expert {experts[top]!r}" if top < len(experts) else "the base"
            yield (
                f"{name} gives {100 * means[top]:.0f} % of the routing weight to {whom}: it is one expert for "
                "everything, not routing."
            )


def _constant(report: EvaluationReport) -> Iterator[str]:
    for name, method in _routed(report):
        shares = list(method.shares().values())
        if _short(name) in CONSTANT or len(shares) < 2:
            continue
        change = largest_change(shares)
        if change < NO_CHANGE:
            yield (
                f"{name} routes all tasks alike: in no layer do the experts' shares differ by more than "
                f"{100 * change:.1f} points between two tasks. Its router does not look at the tokens, or not enough."
            )


def _not_better(report: EvaluationReport) -> Iterator[str]:
    """Methods that were asked for against the controls, by loss."""
    for name, method in report.methods.items():
        if _short(name) in CONTROLS or method.kind not in ("routed", "pinned"):
            continue
        same, worse = [], []
        for kind, told in CONTROLS.items():
            other = report.reference(name, kind)
            gap = report.difference(name, other, LOSS) if other else None
            if gap is None or gap.high < 0:
                continue
            (worse if gap.low > 0 else same).append(f"{told} ({plain(gap, LOSS)})")
        if worse:
            yield f"{name} has a higher loss than {_and(worse)}."
        if same:
            yield f"{name} is not better in loss than {_and(same)}."
    for name, method in report.methods.items():
        other = report.reference(name, "base") if method.kind == "random_lora" else None
        gap = report.difference(name, other, LOSS) if other else None
        if gap is not None and gap.high < 0:
            yield f"Random LoRAs of the same norms already lower the loss of the base: {signed(gap, LOSS)}."


def _and(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _oracle(report: EvaluationReport) -> Iterator[str]:
    for name, method in report.methods.items():
        base = report.reference(name, "base") if method.kind == "oracle" else None
        if base is None:
            continue
        ours, theirs = method.values(LOSS), report.methods[base].values(LOSS)
        own = report.data["libraries"][method.library]["own"]
        for task, rows in ours.items():
            gap = paired_difference({task: rows}, {task: theirs[task]})
            if gap.low > 0:
                yield f"On {task!r} its own expert {own[task]!r} is worse than the base in loss: {signed(gap, LOSS)}."
            elif not gap.is_clear:
                yield f"On {task!r} its own expert {own[task]!r} is not better than the base in loss."
        for kind, told in (("uniform", "uniform weights"), ("random_lora", "random LoRAs")):
            other = report.reference(name, kind)
            gap = report.difference(name, other, LOSS) if other else None
            if gap is not None and gap.high >= 0:
                yield (
                    f"Each task with its own expert is not better in loss than {told} ({plain(gap, LOSS)}): choosing "
                    "experts cannot help here."
                )


def _reading(report: EvaluationReport) -> Iterator[str]:
    failed: dict[tuple[str, str], list] = {}
    cut: dict[str, int] = {}
    empty: list[str] = []
    for name, method in report.methods.items():
        for run in method.runs:
            for task, cell in run["tasks"].items():
                cut[task] = max(cut.get(task, 0), cell["cut"])
                for metric, (count, reason) in cell["failed"].items():
                    failed.setdefault((metric, task), [name, count, reason])
                if cell["answers"] and not any(answer.strip() for answer in cell["answers"]):
                    empty.append(f"{name} on {task!r}")
    for (metric, task), (name, count, reason) in failed.items():
        yield f"Metric {metric!r} failed on {count} rows of {task!r} ({name}; {reason}); its mean is without them."
    for task, count in cut.items():
        if count:
            yield f"{count} prompts of {task!r} were cut on the left to fit the model's context."
    if empty:
        yield f"All generated answers are empty: {_and(empty[:6])}."
    few = [name for name, task in report.data["tasks"].items() if task["rows"] < FEW_ROWS]
    if few:
        yield f"Fewer than {FEW_ROWS} judged rows, so intervals are rough: {', '.join(map(repr, few))}."
    for task in report.data["tasks"]:
        rows = report.methods["base"].values(LOSS).get(task) if "base" in report.methods else None
        if rows and task_mean(rows) < 0.05:
            yield f"The base alone has a loss of {task_mean(rows):.3f} on {task!r}: there is nothing left to gain."
