"""LoraHub (arXiv 2307.13269): one weight an expert for the whole model, searched without gradients."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np


BOUND = 1.5  # weights are searched in [-1.5, 1.5], from 0 on
SPARSITY = 0.05  # times mean |w| is added to the loss


def search(
    loss_of: Callable[[Sequence[float]], float],
    count: int,
    *,
    evaluations: int,
    seed: int,
    log: Path,
    on_step: Callable[[int, int], None] = lambda step, steps: None,
) -> tuple[list[float], list[float]]:
    """Search the weights of experts with nevergrad's NGOpt.

    Every loss is written to `log` at once, and the search asks the same after the same losses: a killed run goes on.

    Args:
        loss_of (`Callable`): weights -> loss on the rows.
        count (`int`): experts.
        evaluations (`int`): how many weights are tried.
        seed (`int`): of the search.
        log (`Path`): JSON lines of earlier losses of the same search.
        on_step (`Callable`): called with (tried, evaluations).

    Returns:
        `tuple`: the weights that the search recommends, and all losses.

    Raises:
        ImportError: nevergrad is not installed.
    """
    try:
        import nevergrad
    except ImportError as error:
        raise ImportError('method "lorahub" needs nevergrad: pip install "peft-arrow[adapt]"') from error
    known = _read(log)
    parameters = nevergrad.p.Array(init=np.zeros(count), lower=-BOUND, upper=BOUND)
    parameters.random_state.seed(seed)
    optimizer = nevergrad.optimizers.NGOpt(parametrization=parameters, budget=evaluations)
    losses = []
    # NGOpt may take scipy's COBYLA, which says that it would like more evaluations
    with warnings.catch_warnings(), log.open("a", encoding="utf-8") as file:
        warnings.filterwarnings("ignore", message="COBYLA", category=UserWarning)
        for step in range(evaluations):
            asked = optimizer.ask()
            loss = next(known, None)
            if loss is None:
                loss = loss_of(asked.value.tolist())
                file.write(json.dumps(loss) + "\n")
                file.flush()
            optimizer.tell(asked, loss + SPARSITY * float(np.abs(asked.value).mean()))
            losses.append(loss)
            on_step(step + 1, evaluations)
    return optimizer.provide_recommendation().value.tolist(), losses


def _read(log: Path) -> Iterator[float]:
    """Losses of a search before; a last line that a kill cut short is removed."""
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        log.write_text(whole, encoding="utf-8")
    return iter([json.loads(line) for line in whole.splitlines()])
