"""How many optimizer steps each expert gets: the same sum for every kind of library (arXiv 2405.11157, section 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from trl import SFTConfig

from ..training.data import Examples


PRIVATE_SHARE = Fraction(2, 5)


def steps_of_tasks(
    parts: Mapping[str, Examples], arguments: SFTConfig, steps: int | None, least: int = 2
) -> dict[str, int]:
    """The steps that each task brings into the budget.

    Args:
        parts (`Mapping[str, Examples]`): the tasks.
        arguments (`SFTConfig`): for the epochs and the rows of a step, where `steps` is not given.
        steps (`int`, *optional*): the same number for every task; otherwise `max_steps` of the arguments if it is
            positive, or else their epochs over the task's rows.
        least (`int`): the fewest for a task: 2 where it is trained in two stages.

    Raises:
        ValueError: fewer steps than that for a task.
    """
    fixed = steps if steps is not None else arguments.max_steps if arguments.max_steps > 0 else None
    if fixed is not None and fixed < least:
        stages = ", one for each stage" if least > 1 else ""
        raise ValueError(f"steps={fixed} is not allowed; a task needs at least {least}{stages}.")
    rows_a_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return {
        task: fixed or max(least, math.ceil(arguments.num_train_epochs * math.ceil(len(part.dataset) / rows_a_step)))
        for task, part in parts.items()
    }


def private_share(steps: int) -> int:
    """The steps of a task's private adapter where clusters follow: 40 %, at least one, and one is left."""
    return min(max(1, round(PRIVATE_SHARE * steps)), steps - 1)


def steps_of_groups(groups: Mapping[str, Sequence[str]], steps: Mapping[str, int]) -> dict[str, int]:
    """The steps of each group's expert: the sum over its tasks."""
    return {group: sum(steps[task] for task in tasks) for group, tasks in groups.items()}


def divided(total: int, names: Sequence[str]) -> dict[str, int]:
    """Equal numbers whose sum is `total`; the first ones get what is left over."""
    each, more = divmod(total, len(names))
    return {name: each + (position < more) for position, name in enumerate(names)}
