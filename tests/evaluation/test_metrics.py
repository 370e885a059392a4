"""Metrics of answers: the built-in ones by hand, objects of the package evaluate, and ones that fail."""

from __future__ import annotations

import pytest

from peft_arrow.evaluation.metrics import exact_match, make_scorers, score_answer


class Length:
    """As `evaluate.load(...)` returns it; refuses what is longer than three characters."""

    name = "length"

    def compute(self, *, predictions, references):
        if len(predictions[0]) > 3:
            raise ValueError("too long for me")
        return {"length": len(predictions[0])}


def test_exact_match():
    assert exact_match(" yes\n", ["no", "yes"]) == 1.0
    assert exact_match("yes.", ["yes"]) == exact_match("", ["yes"]) == 0.0


def longest_common(left, right):
    """Length of the longest common subsequence, by recursion over the last words."""
    if not left or not right:
        return 0
    if left[-1] == right[-1]:
        return 1 + longest_common(left[:-1], right[:-1])
    return max(longest_common(left[:-1], right), longest_common(left, right[:-1]))


def test_rouge_l():
    pytest.importorskip("rouge_score")
    score = make_scorers(["rouge_l"])["rouge_l"]
    prediction, reference = "the cat lies on a mat", "a cat on the mat"
    common = longest_common(prediction.split(), reference.split())
    recall, precision = common / 5, common / 6
    expected = 2 * recall * precision / (recall + precision)
    assert score(prediction, [reference])["rouge_l"] == pytest.approx(expected)
    assert score(prediction, ["nothing", reference])["rouge_l"] == pytest.approx(expected)
    assert score("cats", ["cat"])["rouge_l"] == 1.0  # Porter stemming
    assert score("", ["cat"])["rouge_l"] == 0.0


def test_objects_and_failures():
    scorers = make_scorers(["exact_match", Length()])
    assert score_answer(scorers, "yes", ["yes"]) == ({"exact_match": 1.0, "length": 3.0}, {})
    values, failed = score_answer(scorers, "perhaps", ["yes"])
    assert values == {"exact_match": 0.0} and failed == {"length": "ValueError: too long for me"}


def test_an_object_of_the_package_evaluate():
    evaluate = pytest.importorskip("evaluate")
    datasets = pytest.importorskip("datasets")

    class Same(evaluate.Metric):
        def _info(self):
            features = datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            )
            return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

        def _compute(self, predictions, references):
            return {
                "hits": sum(a == b for a, b in zip(predictions, references, strict=True)),
                "count": len(predictions),
            }

    metric = Same()
    found, failed = score_answer(make_scorers([metric]), "a", ["a"])
    assert found == {f"{metric.name}/hits": 1.0, f"{metric.name}/count": 1.0} and failed == {}


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (["bleu"], "'bleu', which is unknown; built in are exact_match, rouge_l"),
        (["exact_match", "exact_match"], "holds 'exact_match' twice"),
        ([3], "allowed are names and objects with a method compute"),
    ],
)
def test_metrics_that_are_refused(metrics, message):
    with pytest.raises(ValueError, match=message):
        make_scorers(metrics)


def test_values_that_are_no_numbers_are_failures():
    class Odd:
        def compute(self, **_):
            return {"a": float("nan")}

    class Empty:
        def compute(self, **_):
            return {}

    values, failed = score_answer(make_scorers([Odd(), Empty()]), "x", ["x"])
    assert values == {} and set(failed) == {"Odd", "Empty"}
