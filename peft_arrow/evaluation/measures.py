"""The numbers that are reported: what each is called, and which way is better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .rows import Row
from .scoring import OptionScore


@dataclass(frozen=True)
class Measure:
    """A number of each judged row.

    Args:
        key (`str`): its name in files and tables.
        title (`str`): for people.
        is_loss (`bool`): whether lower is better.
        kind (`str`): `"nats"`, or `"share"`: from 0 to 1, or `"score"`: anything.
    """

    key: str
    title: str
    is_loss: bool = False
    kind: str = "share"


MEASURES = {
    measure.key: measure
    for measure in (
        Measure("loss", "Loss of the right answer, nats per token, its end token included", is_loss=True, kind="nats"),
        Measure(
            "acc_paper", "Accuracy, choice by the mean over an option's tokens and its end token (arXiv 2405.11157)"
        ),
        Measure("acc", "Accuracy, choice by the log-likelihood of an option (lm-eval-harness: acc)"),
        Measure("acc_norm", "Accuracy, choice by the log-likelihood per character (lm-eval-harness: acc_norm)"),
        Measure("exact_match", "Exact match of the generated answer, without white space around it"),
        Measure("rouge_l", "Rouge-L (F) of the generated answer, with stemming"),
    )
}


def measure_of(key: str) -> Measure:
    """The measure of that key; one that is not built in comes from a metric, of which more is taken to be better."""
    return MEASURES.get(key, Measure(key, f"{key} of the generated answer", kind="score"))


def choice_values(row: Row, scores: Sequence[OptionScore]) -> dict[str, float]:
    """Loss and accuracies of one choice row; of equal options the first is taken, as lm-eval-harness does.

    Args:
        row (`Row`): with options and gold.
        scores (`Sequence[OptionScore]`): of its options.
    """
    by_nll = _first_best([-score.mean_nll for score in scores])
    by_sum = _first_best([score.loglik for score in scores])
    by_character = _first_best([score.loglik / len(option) for score, option in zip(scores, row.options, strict=True)])
    return {
        "loss": scores[row.gold].mean_nll,
        "acc_paper": float(by_nll == row.gold),
        "acc": float(by_sum == row.gold),
        "acc_norm": float(by_character == row.gold),
    }


def _first_best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
