"""Metrics of generated answers: two that need no network, and any object of the package evaluate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol


class Metric(Protocol):
    """What `evaluate.load(...)` returns."""

    def compute(self, *, predictions: list[str], references: list) -> Mapping[str, Any]:
        """Name -> value, for several predictions and their references."""


# What foreign code raises where an example is not to its taste.
FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
Scorer = Callable[[str, Sequence[str]], Mapping[str, float]]


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 where the prediction is one of the references, white space around both left out; 0.0 otherwise."""
    return float(prediction.strip() in {reference.strip() for reference in references})


def make_rouge_l() -> Callable[[str, Sequence[str]], float]:
    """Rouge-L F measure with Porter stemming, the best over the references (package rouge-score).

    Raises:
        ImportError: rouge-score is missing; the message names the extra.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        message = "the metric 'rouge_l' needs rouge-score, which is not installed: pip install 'peft-arrow[eval]'"
        raise ImportError(message) from error
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return lambda prediction, references: max(
        scorer.score(reference, prediction)["rougeL"].fmeasure for reference in references
    )


BUILT_IN = {"exact_match": lambda: exact_match, "rouge_l": make_rouge_l}


def make_scorers(metrics: Sequence[str | Metric]) -> dict[str, Scorer]:
    """Name -> what scores one prediction against its references.

    Args:
        metrics (`Sequence`): names of `BUILT_IN`, and objects with a method `compute`, as evaluate has them.

    Raises:
        ValueError: an unknown name, a name twice, or an object without `compute`.
    """
    scorers: dict[str, Scorer] = {}
    for metric in metrics:
        name = metric if isinstance(metric, str) else str(getattr(metric, "name", None) or type(metric).__name__)
        if name in scorers:
            raise ValueError(f"metrics holds {name!r} twice.")
        if isinstance(metric, str):
            if metric not in BUILT_IN:
                raise ValueError(f"metrics holds {metric!r}, which is unknown; built in are {', '.join(BUILT_IN)}.")
            scorers[name] = _named(name, BUILT_IN[metric]())
        elif callable(getattr(metric, "compute", None)):
            scorers[name] = _of_object(name, metric)
        else:
            raise ValueError(f"metrics holds {metric!r}; allowed are names and objects with a method compute.")
    return scorers


def _named(name: str, score: Callable[[str, Sequence[str]], float]) -> Scorer:
    return lambda prediction, references: {name: score(prediction, references)}


def _of_object(name: str, metric: Metric) -> Scorer:
    """One example at a time, so that the values of rows can be resampled; a metric of a whole corpus is averaged."""

    def score(prediction: str, references: Sequence[str]) -> dict[str, float]:
        right = references[0] if len(references) == 1 else list(references)
        found = metric.compute(predictions=[prediction], references=[right])
        numbers = {key: float(value) for key, value in found.items() if isinstance(value, (int, float))}
        if not numbers:
            raise ValueError(f"it returned no number but {found!r}")
        return (
            {name: next(iter(numbers.values()))}
            if len(numbers) == 1
            else {f"{name}/{key}": value for key, value in numbers.items()}
        )

    return score


def score_answer(
    scorers: Mapping[str, Scorer], prediction: str, references: Sequence[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """The values of one answer, and by metric why one failed.

    Args:
        scorers (`Mapping`): of [`make_scorers`].
        prediction (`str`): the generated answer; an empty one scores 0 with the built-in metrics.
        references (`Sequence[str]`): the right answers.
    """
    values: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, score in scorers.items():
        try:
            found = score(prediction, references)
            if not all(map(math.isfinite, found.values())):
                raise ValueError(f"it returned {found}")
            values |= found
        except FAILURES as error:
            failed[name] = f"{type(error).__name__}: {error}"
    return values, failed
