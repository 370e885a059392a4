"""Signs that an expert was trained on the judged rows, from losses alone; training data is not known here.

Two signs are looked for, both relative to the base, so that harder or easier rows do not count.

- Better on judged rows: an expert that gains clearly more on the judged rows of a task than on rows for selection,
  and has a lower loss there. Experts that were trained on the rows for selection gain more on *those*, experts that
  were trained on neither gain the same on both.
- No gap: an expert that is as good on the judged rows of its own task as on rows for selection, while most other
  experts have learnt their training rows by heart. That is also what a task looks like that was learnt as a rule.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import mannwhitneyu


Losses = Mapping[str, Mapping[str, Sequence[float]]]
CHANCE = 0.01
LEAST_GAIN = 0.1
DRAWS = 1000


@dataclass(frozen=True)
class Leak:
    """One expert on one task.

    Args:
        expert, task (`str`): which.
        is_better (`bool`): better on judged rows; otherwise it has no gap, unlike the others.
        judged, selection (`float`): its mean losses, nats per token.
        others (`float`, *optional*): median gap of the other experts, where that was the sign.
    """

    expert: str
    task: str
    is_better: bool
    judged: float
    selection: float
    others: float | None = None

    def told(self) -> str:
        """The sign as a sentence."""
        if self.is_better:
            return (
                f"Possible leak: expert {self.expert!r} is better on the judged rows of {self.task!r} (loss "
                f"{self.judged:.2f}) than on rows of its split 'train' ({self.selection:.2f}), more than the base is. "
                "An expert that never saw the judged rows is not; look at what it was trained on."
            )
        return (
            f"Possible leak: expert {self.expert!r} is as good on the judged rows of {self.task!r} (loss "
            f"{self.judged:.2f}) as on its training rows ({self.selection:.2f}), while the other experts lose "
            f"{self.others:.2f} nats (median) from the one to the other. Either its task was learnt as a rule, or the "
            "judged rows were among its training rows."
        )


def find_leaks(alone: Mapping[str, Losses], own: Mapping[str, str]) -> list[Leak]:
    """The signs in the losses of experts by themselves.

    Args:
        alone (`Mapping`): expert, or "" for the base -> task -> losses of rows, by `selection` and `judged`.
        own (`Mapping[str, str]`): task -> its own expert.

    Returns:
        `list[Leak]`: of all pairs of expert and task, at most one in a hundred reports has a false one of the first
        kind (Mann-Whitney tests of the gains over the base and of the losses, Bonferroni-corrected). The losses are
        sharper where the base's are noisy, as with a few labels; the mean gain must be larger on judged rows anyway.
    """
    experts = [expert for expert in alone if expert]
    pairs = [(expert, task) for expert in experts for task in alone[expert]]
    better = [_better(alone, expert, task, CHANCE / len(pairs)) for expert, task in pairs]
    found = [leak for leak in better if leak is not None]
    known = {leak.task for leak in found}
    return found + [leak for leak in _without_gap(alone, own) if leak.task not in known]


def is_blind(alone: Mapping[str, Losses]) -> bool:
    """Whether there are too few rows for the first sign to be seen at all."""
    experts = [expert for expert in alone if expert]
    tasks = [alone[expert][task] for expert in experts for task in alone[expert]]
    least = [1 / math.comb(len(task["judged"]) + len(task["selection"]), len(task["judged"])) for task in tasks]
    return not tasks or 2 * min(least) > CHANCE / len(tasks)


def _gains(alone: Mapping[str, Losses], expert: str, task: str, part: str) -> list[float]:
    return [base - ours for base, ours in zip(alone[""][task][part], alone[expert][task][part], strict=True)]


def _means(alone: Mapping[str, Losses], expert: str, task: str) -> tuple[float, float]:
    losses = alone[expert][task]
    return statistics.fmean(losses["judged"]), statistics.fmean(losses["selection"])


def _better(alone: Mapping[str, Losses], expert: str, task: str, chance: float) -> Leak | None:
    judged, selection = (_gains(alone, expert, task, part) for part in ("judged", "selection"))
    loss, other = _means(alone, expert, task)
    more = statistics.fmean(judged) - statistics.fmean(selection)
    if loss >= other or more < LEAST_GAIN or statistics.fmean(judged) <= 0:
        return None
    losses = alone[expert][task]
    by_chance = (
        mannwhitneyu(judged, selection, alternative="greater").pvalue,
        mannwhitneyu(losses["judged"], losses["selection"], alternative="less").pvalue,
    )
    return Leak(expert, task, True, loss, other) if 2 * min(by_chance) < chance else None


def _without_gap(alone: Mapping[str, Losses], own: Mapping[str, str]) -> list[Leak]:
    pairs = [(expert, task) for task, expert in own.items() if task in alone.get(expert, {})]
    gaps = {pair: _gap(alone, *pair) for pair in pairs}
    found = []
    for pair, (_, high) in gaps.items():
        others = [gap for other, gap in gaps.items() if other != pair]
        learnt = [gap for gap in others if gap[0] > 0]
        if len(learnt) < 2 or len(learnt) < 2 / 3 * len(others):
            continue
        usual = statistics.median((low + high) / 2 for low, high in others)
        if high < usual / 2:
            found.append(Leak(*pair, False, *_means(alone, *pair), others=usual))
    return found


def _gap(alone: Mapping[str, Losses], expert: str, task: str) -> tuple[float, float]:
    """95 % bootstrap interval of how much more the expert gains on rows for selection than on judged ones."""
    rng = np.random.default_rng(0)
    selection, judged = (np.array(_gains(alone, expert, task, part)) for part in ("selection", "judged"))
    means = [rng.choice(part, (DRAWS, len(part))).mean(axis=1) for part in (selection, judged)]
    low, high = np.quantile(means[0] - means[1], [0.025, 0.975])
    return float(low), float(high)
