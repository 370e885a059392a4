"""LoraHub's search on a task's rows: the loss of each try, and the LoRA of the weights it ends with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from peft import get_peft_model
from transformers import set_seed

from ..evaluation.scoring import score_encoded
from ..training.base import kept_random_state, lent
from ..training.checkpoints import checkpoints_of, prepare_checkpoints
from ..training.fitting import Outcome
from ..training.jobs import Job, Plan, record_of, write_expert
from ..training.targets import with_targets
from .lorahub import search
from .methods import Task
from .readable import encoded_rows
from .starts import Factors, set_factors


LOG_NAME = "lorahub.jsonl"


def search_weights(task: Task, job: Job, plan: Plan, on_step: Callable[[int, int], None]) -> None:
    """Search one weight an expert and write the LoRA with A = sum w_i A_i, B = sum w_i B_i.

    A killed search goes on from the losses it wrote.

    Raises:
        ValueError: rows without completions, or a base that the library is not of.
        ImportError: nevergrad is missing.
    """
    started, base, stacks = time.monotonic(), task.base, dict(task.experts.items())
    pairs = encoded_rows(task, task.options["rows"], "lorahub")
    evaluations = task.options["evaluations"]
    work = checkpoints_of(job.folder)
    prepare_checkpoints(work, job.identity)
    with kept_random_state(), lent(base.model) as model:
        set_seed(plan.init_seed)
        peft_model = get_peft_model(model, with_targets(job.lora, model), revision=base.revision).eval()
        try:

            def loss_of(weights: Sequence[float]) -> float:
                set_factors(peft_model, weighted(stacks, weights))
                return statistics.fmean(score.mean_nll for score in score_encoded(peft_model, pairs))

            with torch.no_grad():
                weights, losses = search(
                    loss_of,
                    len(task.members),
                    evaluations=evaluations,
                    seed=job.arguments.seed,
                    log=work / LOG_NAME,
                    on_step=on_step,
                )
            set_factors(peft_model, weighted(stacks, weights))
            tokens = evaluations * sum(len(pair.ids) for pair in pairs)
            record = record_of(job, Outcome(0, tokens, losses), peft_model, time.monotonic() - started)
            write_expert(peft_model, record, job.folder)
        finally:
            peft_model.unload()


def weighted(stacks: Mapping[str, tuple[torch.Tensor, torch.Tensor]], weights: Sequence[float]) -> Factors:
    """Every module's A = sum w_i A_i and B = sum w_i B_i, of A (E, R, I) and B (E, O, R)."""
    w_E = torch.tensor(weights, dtype=torch.float32)
    return {module: tuple(torch.tensordot(w_E, stack, 1) for stack in pair) for module, pair in stacks.items()}
