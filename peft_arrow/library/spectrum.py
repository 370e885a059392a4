"""Statistics of an adapter's update, as published screens for poisoned LoRA adapters use them. They report, no more.

The singular values of delta W = s B A follow from two r x r products: with A A^T = R R^T they are the roots of the
eigenvalues of R^T (B^T B) R, times |s|. In float64 that is good to about 1e-8 of the largest one.
Sources:

- Weight space Detection of Backdoors in LoRA Adapters, https://arxiv.org/abs/2602.15195: leading singular value,
  Frobenius norm, energy in the first direction, spectral entropy, kurtosis; compared with a bank of clean adapters.
- Token-Level Generalization in LoRA Adapter Backdoors, https://arxiv.org/abs/2605.30189: the standard deviation over
  modules of the Frobenius norm divided by the size of the matrix.
- The effective rank, Roy and Vetterli 2007, http://ieeexplore.ieee.org/document/7098875/: exp of the entropy of the
  normalised singular values.
- The modified z-score, 0.6745 (x - median) / MAD, Iglewicz and Hoaglin 1993,
  https://www.itl.nist.gov/div898/handbook/eda/section3/eda35h.htm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from .lora import Factors


@dataclass(frozen=True)
class Statistic:
    """One row of the table of statistics.

    Args:
        text (`str`): what it is, for people.
        log (`bool`): compared by its logarithm, because it differs by factors and not by amounts.
        source (`str`): the paper that uses it.
    """

    text: str
    log: bool
    source: str


STATISTICS = {
    "largest": Statistic("largest singular value of a module", True, "https://arxiv.org/abs/2602.15195"),
    "norm": Statistic("length of the whole update", True, "https://arxiv.org/abs/2602.15195"),
    "first_share": Statistic(
        "share of the update in each module's first direction", False, "https://arxiv.org/abs/2602.15195"
    ),
    "rank_use": Statistic("effective rank over rank", False, "http://ieeexplore.ieee.org/document/7098875/"),
    "kurtosis": Statistic(
        "how far the update is concentrated on a few outputs (kurtosis)", True, "https://arxiv.org/abs/2602.15195"
    ),
    "norm_spread": Statistic("difference in length between modules", True, "https://arxiv.org/abs/2605.30189"),
}
FEWEST_ADAPTERS = 8
# (adapters, score): of so many, about 5 % are above the score in one of six independent, normally distributed numbers.
SCORES = ((24, 3.5), (12, 5.0), (FEWEST_ADAPTERS, 8.0))
# The least that counts as one deviation, 0.05, or 5 % where logarithms are compared, however equal the others are.
SMALLEST_SCALE = 0.05


@dataclass(frozen=True)
class Outlier:
    """An adapter that differs from the others in one statistic.

    Args:
        name (`str`): the adapter.
        statistic (`str`): a key of `STATISTICS`.
        value (`float`): its value.
        median (`float`): the median of the other adapters.
        score (`float`): robust standard deviations from it: (x - median) / (1.4826 MAD) of the others.
    """

    name: str
    statistic: str
    value: float
    median: float
    score: float


def module_spectrum(factor: Factors) -> tuple[np.ndarray, np.ndarray]:
    """The singular values of delta W = s B A, largest first, and the lengths of its rows, (O,); float64.

    A row's length says how much that output is changed.
    """
    lora_A, lora_B = factor.lora_A.detach().cpu().double(), factor.lora_B.detach().cpu().double()
    squares, vectors = torch.linalg.eigh(lora_A @ lora_A.T)
    rotated = lora_B @ (vectors * squares.clamp(min=0).sqrt())  # B R, whose rows are as long as those of B A
    values = torch.linalg.eigvalsh(rotated.T @ rotated).clamp(min=0).sqrt().flip(0)
    values = values[: min(lora_A.shape[1], lora_B.shape[0])]  # a rank above the widths adds zeros only
    lengths = rotated.norm(dim=1)
    return (abs(factor.scaling) * values).numpy(), (abs(factor.scaling) * lengths).numpy()


def adapter_statistics(factors: Iterable[Factors]) -> dict[str, float]:
    """The statistics of one adapter, named as in `STATISTICS`; empty where its whole update is zero.

    Args:
        factors (iterable of `Factors`): of its modules, all finite; one is held at a time.
    """
    largest, squares, shares, uses, kurtoses, sized = [], [], [], [], [], []
    for factor in factors:
        values, lengths = module_spectrum(factor)
        square = float((values**2).sum())
        squares.append(square)
        sized.append(math.sqrt(square / (factor.lora_A.shape[1] * factor.lora_B.shape[0])))
        if square == 0:
            continue
        shape = values / values.sum()
        entropy = -float((shape[shape > 0] * np.log(shape[shape > 0])).sum())
        largest.append(float(values[0]))
        shares.append(float(values[0] ** 2 / square))
        uses.append(math.exp(entropy) / len(values))
        kurtoses.append(_kurtosis(lengths))
    if not largest:
        return {}
    return {
        "largest": max(largest),
        "norm": math.sqrt(sum(squares)),
        "first_share": float(np.mean(shares)),
        "rank_use": float(np.mean(uses)),
        "kurtosis": float(np.mean(kurtoses)),
        "norm_spread": float(np.std(sized)),
    }


def _kurtosis(values: np.ndarray) -> float:
    """Fourth central moment over the squared variance; 1, its least, where all values are equal."""
    centred = values - values.mean()
    variance = float((centred**2).mean())
    return float((centred**4).mean()) / variance**2 if variance > 0 else 1.0


def find_outliers(statistics: Mapping[str, Mapping[str, float]]) -> tuple[Outlier, ...]:
    """Adapters that differ from the others in a statistic, the farthest first; none where there are too few.

    Each is compared with the median and the median absolute deviation of the others. The score to pass depends on how
    many there are (`SCORES`), because few adapters say little about what is usual.

    Args:
        statistics (`Mapping`): adapter name -> what `adapter_statistics` returned.
    """
    known = {name: values for name, values in statistics.items() if values}
    limit = next((score for count, score in SCORES if len(known) >= count), None)
    if limit is None:
        return ()
    found = []
    for statistic, row in STATISTICS.items():
        values = np.array([_scaled(entry[statistic], row.log) for entry in known.values()])
        for position, name in enumerate(known):
            others = np.delete(values, position)
            median = float(np.median(others))
            scale = max(1.4826 * float(np.median(abs(others - median))), SMALLEST_SCALE)
            score = (float(values[position]) - median) / scale
            if abs(score) > limit:
                shown = math.exp(median) if row.log else median
                found.append(Outlier(name, statistic, known[name][statistic], shown, score))
    return tuple(sorted(found, key=lambda outlier: (-abs(outlier.score), outlier.name)))


def _scaled(value: float, log: bool) -> float:
    return math.log(max(value, 1e-30)) if log else value
