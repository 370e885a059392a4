"""Poly and MHR (arXiv 2202.13914, 2211.03831): skills shared by all tasks, trained with PEFT, saved as plain LoRAs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from peft import PeftModel, PolyConfig
from peft.tuners.poly import PolyLayer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .base import Base
from .checkpoints import checkpoints_of
from .data import Examples, check_lengths, joined
from .jobs import Job, Plan, finished, identity_of
from .optimizers import two_rates
from .processes import Processes
from .progress import reporting
from .recipe import lora_arguments, sft_arguments
from .record import TrainingRecord
from .stage import Stage, try_job


TASK_COLUMN = "task_ids"
MODEL_NAME = "poly"


class TaskCollator:
    """TRL's batches, with the number of each row's task beside it."""

    def __init__(self, pad_token_id: int) -> None:
        self._inner = DataCollatorForLanguageModeling(pad_token_id=pad_token_id)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """One batch."""
        batch = self._inner([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
        batch[TASK_COLUMN] = torch.tensor([row[TASK_COLUMN] for row in rows])
        return batch


def train_poly(
    base: Base,
    parts: Mapping[str, Examples],
    folder: Path,
    plan: Plan,
    processes: Processes,
    *,
    steps: int,
    n_skills: int = 8,
    n_splits: int = 1,
    progress: bool = True,
) -> Stage:
    """Train one Poly model on all tasks together; the first process trains it. `n_splits` above 1 is MHR.

    PEFT's Poly has a rank and no alpha (its scale is 1 / r), and no dropout; of `lora_config` it takes `r` and
    `target_modules`.

    Args:
        base, plan, processes, progress: as in `train_stage`.
        parts (`Mapping[str, Examples]`): task -> its rows.
        folder (`Path`): of the stage; the model lies in `folder/poly`.
        steps (`int`): optimizer steps.
        n_skills (`int`): LoRAs in each layer that the tasks share.
        n_splits (`int`): parts of a layer's features with weights of their own.

    Raises:
        ValueError: rows or configs are bad, it was trained in another way before, or the launch shards the base.
    """
    if processes.together:
        raise ValueError(
            "kinds 'poly' and 'mhr' cannot be trained under FSDP or DeepSpeed: they bring an optimizer of their own, "
            "which the trainer refuses for a sharded model; launch without them, or choose another kind."
        )
    job = _plan_poly(base, parts, folder / MODEL_NAME, plan, steps, n_skills, n_splits)
    loads = {MODEL_NAME: steps} if processes.from_main(finished(job, plan.overwrite) is None) else {}
    if loads:
        base.load()
    with reporting(f"stage {MODEL_NAME}", folder, loads, processes, progress and bool(loads)) as reporter:
        reasons = [try_job(base, job, plan, processes, reporter) for _ in processes.mine(list(loads))]
        failed = [reason for reason in processes.gather(reasons) if reason is not None]
    if failed:
        return Stage(MODEL_NAME, folder, {}, {MODEL_NAME: failed[0]})
    return Stage(MODEL_NAME, folder, {MODEL_NAME: TrainingRecord.read(job.folder)}, {})


def _plan_poly(
    base: Base, parts: Mapping[str, Examples], folder: Path, plan: Plan, steps: int, n_skills: int, n_splits: int
) -> Job:
    arguments = sft_arguments(plan.sft_config, checkpoints_of(folder), steps)
    if arguments.packing or arguments.padding_free or arguments.gradient_checkpointing:
        raise ValueError(
            "sft_config asks for packing, padding_free or gradient_checkpointing, which Poly cannot have: every row "
            "brings its task, and the forward is not repeated."
        )
    arguments.remove_unused_columns = False  # the column of the tasks
    lora = lora_arguments(plan.lora_config)
    config = PolyConfig(
        r=lora.r,
        target_modules=lora.target_modules,
        n_tasks=len(parts),
        n_skills=n_skills,
        n_splits=n_splits,
        task_type=lora.task_type,
    )
    numbered = []
    for number, (task, part) in enumerate(parts.items()):
        check_lengths(part, base.tokenizer, arguments.max_length)
        dataset = part.dataset.add_column(TASK_COLUMN, [number] * len(part.dataset))
        numbered.append(replace(part, name=task, dataset=dataset))
    whole = joined(MODEL_NAME, numbered)
    digest = hashlib.sha256(f"{list(parts)}{whole.fingerprint}".encode()).hexdigest()
    whole = replace(whole, dataset=concatenate_datasets([part.dataset for part in numbered]), fingerprint=digest)
    identity = identity_of(base, digest, plan, arguments, config)
    more = partial(_poly_options, arguments=arguments, pad_token_id=base.tokenizer.pad_token_id)
    return Job(whole, folder, arguments, config, identity, more)


def _poly_options(model: PeftModel, arguments: Any, pad_token_id: int) -> dict[str, Any]:
    """The collator, and AdamW with a learning rate of their own for the tasks' weights.

    Raises:
        ValueError: a layer whose features cannot be split evenly.
    """
    splits = model.active_peft_config.n_splits
    for name, module in model.named_modules():
        sizes = (module.in_features, module.out_features) if isinstance(module, PolyLayer) else ()
        if any(size % splits for size in sizes):
            raise ValueError(f"n_splits={splits} does not divide the features of {name}, {sizes}.")
    optimizer = two_rates(model, arguments, lambda name: "poly_router" in name)
    return {"collator": TaskCollator(pad_token_id), "optimizer": optimizer}
