"""Statistics of updates against dense singular values; who stands out, who does not, and when nothing is said."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_arrow.library.lora import Factors
from peft_arrow.library.spectrum import (
    FEWEST_ADAPTERS,
    SCORES,
    STATISTICS,
    adapter_statistics,
    find_outliers,
    module_spectrum,
)


def factors(seed: int, r: int = 4, width: int = 20, height: int = 16, scale: float = 1.0) -> Factors:
    """Random factors."""
    rng = np.random.default_rng(seed)
    lora_A, lora_B = rng.standard_normal((r, width)), rng.standard_normal((height, r)) * scale
    return Factors(torch.tensor(lora_A), torch.tensor(lora_B), 0.5)


def dense(factor: Factors) -> np.ndarray:
    return factor.scaling * factor.lora_B.numpy() @ factor.lora_A.numpy()


@pytest.mark.parametrize("r", [1, 4, 16, 24])
def test_singular_values_are_those_of_the_dense_update(r):
    """Also where the rank exceeds a width; the rest of the dense ones are zero."""
    factor = factors(1, r)
    values, lengths = module_spectrum(factor)
    expected = np.linalg.svd(dense(factor), compute_uv=False)
    # from products in float64, whose error is relative to the square of the largest
    np.testing.assert_allclose(values, expected[: len(values)], rtol=1e-10, atol=1e-8 * expected[0])
    assert np.all(expected[len(values) :] < 1e-12)
    np.testing.assert_allclose(lengths, np.linalg.norm(dense(factor), axis=1), rtol=1e-10)


def test_the_numbers_are_what_their_names_say():
    """Each from dense matrices, by its definition."""
    modules = [factors(1, 4), factors(2, 3, width=8, height=30), factors(3, 4)]
    matrices = [dense(factor) for factor in modules]
    spectra = [np.linalg.svd(matrix, compute_uv=False)[: f.lora_A.shape[0]] for matrix, f in zip(matrices, modules)]
    found = adapter_statistics(modules)
    assert list(found) == list(STATISTICS)
    assert found["largest"] == pytest.approx(max(spectrum[0] for spectrum in spectra))
    assert found["norm"] == pytest.approx(np.sqrt(sum((matrix**2).sum() for matrix in matrices)))
    assert found["first_share"] == pytest.approx(np.mean([s[0] ** 2 / (s**2).sum() for s in spectra]))
    uses = []
    for spectrum in spectra:
        shares = spectrum / spectrum.sum()
        uses.append(np.exp(-(shares * np.log(shares)).sum()) / len(spectrum))
    assert found["rank_use"] == pytest.approx(np.mean(uses))
    kurtoses = []
    for matrix in matrices:
        rows = np.linalg.norm(matrix, axis=1)
        kurtoses.append(np.mean((rows - rows.mean()) ** 4) / rows.var() ** 2)
    assert found["kurtosis"] == pytest.approx(np.mean(kurtoses))
    sized = [np.sqrt((matrix**2).mean()) for matrix in matrices]
    assert found["norm_spread"] == pytest.approx(np.std(sized))


def test_factors_may_be_turned():
    """The numbers are of the update, not of how it is written."""
    factor = factors(1)
    turn = torch.tensor(np.random.default_rng(5).standard_normal((4, 4)))
    turned = Factors(turn @ factor.lora_A, factor.lora_B @ turn.inverse(), factor.scaling)
    assert adapter_statistics([turned]) == pytest.approx(adapter_statistics([factor]))


def test_zeros():
    """A zero module counts for nothing, a zero adapter has no numbers."""
    zero = Factors(torch.zeros(4, 20), torch.zeros(16, 4), 1.0)
    both = adapter_statistics([factors(1), zero])
    assert both["first_share"] == pytest.approx(adapter_statistics([factors(1)])["first_share"])
    assert adapter_statistics([zero]) == {}
    assert find_outliers({"zero": {}}) == ()


def library(count: int) -> dict[str, dict[str, float]]:
    return {
        f"a{i}": adapter_statistics([factors(10 * i + j, scale=1 + 0.1 * (i % 3)) for j in range(4)])
        for i in range(count)
    }


def test_a_planted_direction_stands_out():
    """One strong direction on few outputs, as a trigger would leave."""
    statistics = library(12)
    modules = [factors(1000 + j) for j in range(4)]
    for factor in modules:
        factor.lora_B[:, 0] = 0
        factor.lora_B[3, 0] = 60.0
    statistics["planted"] = adapter_statistics(modules)
    found = find_outliers(statistics)
    assert found[0].name == "planted"
    for statistic in ("largest", "first_share", "rank_use"):
        assert {outlier.name for outlier in found if outlier.statistic == statistic} == {"planted"}
    largest = next(outlier for outlier in found if outlier.statistic == "largest")
    others = np.log([values["largest"] for name, values in statistics.items() if name != "planted"])
    median = np.median(others)
    scale = max(1.4826 * np.median(abs(others - median)), 0.05)
    assert largest.score == pytest.approx((np.log(largest.value) - median) / scale)
    assert largest.median == pytest.approx(np.exp(median))


def test_few_adapters_say_nothing():
    """With less than eight nothing is usual."""
    statistics = library(FEWEST_ADAPTERS - 1)
    statistics["a0"] = dict.fromkeys(STATISTICS, 1e6)
    assert find_outliers(statistics) == ()
    assert find_outliers({**statistics, "one more": statistics["a1"]}) != ()


def test_equal_adapters_are_no_outliers():
    """Where all others are equal, a difference of some percent is not remarkable."""
    values = library(1)["a0"]
    statistics = {f"a{i}": values for i in range(12)}
    statistics["near"] = {name: value * 1.1 for name, value in values.items()}
    assert find_outliers(statistics) == ()


@pytest.mark.parametrize("count, score", SCORES)
def test_scores_flag_about_one_in_twenty(count, score):
    """What the table of scores promises, for independent normal numbers."""
    rng = np.random.default_rng(0)
    flagged, trials = 0, 150
    for _ in range(trials):
        values = np.exp(rng.standard_normal((count, len(STATISTICS))) * 5)
        spread = np.log(values) * 1000  # the statistics that are not compared by logarithm; far above the least scale
        rows = {
            f"a{i}": {
                name: values[i, j] if row.log else spread[i, j] for j, (name, row) in enumerate(STATISTICS.items())
            }
            for i in range(count)
        }
        flagged += len({outlier.name for outlier in find_outliers(rows)})
    assert 0.02 < flagged / (trials * count) < 0.09, score
