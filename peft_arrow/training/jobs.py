"""One expert: a plain PEFT LoRA of one base on one expert's rows, in a folder that appears when it is complete."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tqdm import tqdm
from transformers import set_seed
from trl import SFTConfig

from ..library.folders import new_folder
from .base import Base, kept_random_state, lent
from .checkpoints import checkpoints_of, newest_checkpoint, prepare_checkpoints
from .data import Examples, check_lengths
from .fitting import Outcome, fit
from .processes import Processes
from .recipe import INIT_SEED, lora_arguments, sft_arguments, telling
from .record import TrainingRecord, check_unchanged
from .targets import with_targets


@dataclass(frozen=True)
class Plan:
    """How every expert of a run is trained.

    Args:
        sft_config (`SFTConfig` or `Mapping`, *optional*): see `sft_arguments`.
        lora_config (`LoraConfig` or `Mapping`, *optional*): see `lora_arguments`.
        init_seed (`int`): set before every expert's A is drawn, so that all start from the same A.
        overwrite (`bool`): train finished experts again where something changed, instead of an error.
    """

    sft_config: SFTConfig | Mapping[str, Any] | None = None
    lora_config: LoraConfig | Mapping[str, Any] | None = None
    init_seed: int = INIT_SEED
    overwrite: bool = False


@dataclass(frozen=True)
class Job:
    """One expert to be trained: its rows, its folder, and both configs filled in.

    `more` is called with the fresh adapter and returns more arguments for `fit`; `after` with the trained one, before
    it is saved.
    """

    examples: Examples
    folder: Path
    arguments: SFTConfig
    lora: PeftConfig
    identity: dict[str, Any]
    more: Callable[[PeftModel], dict[str, Any]] = lambda model: {}
    after: Callable[[PeftModel], Any] = lambda model: None

    @property
    def name(self) -> str:
        """The expert's name."""
        return self.examples.name


def plan_job(base: Base, examples: Examples, folder: Path, plan: Plan, steps: int | None = None) -> Job:
    """Fill in and check everything about one expert before the base is loaded or a file is written.

    Raises:
        ValueError: a config with unknown fields, or rows that are too long.
    """
    arguments = sft_arguments(plan.sft_config, checkpoints_of(folder), steps)
    lora = lora_arguments(plan.lora_config)
    check_lengths(examples, base.tokenizer, arguments.max_length)
    identity = identity_of(base, examples.fingerprint, plan, arguments, lora)
    return Job(examples, folder, arguments, lora, identity)


def identity_of(base: Base, data: str, plan: Plan, arguments: SFTConfig, config: PeftConfig) -> dict[str, Any]:
    """All that decides the result: base, fingerprint of the data, seeds, and of both configs what tells."""
    return {**base.identity, "data": data, "init_seed": plan.init_seed, **telling(arguments, config)}


def finished(job: Job, overwrite: bool = False) -> TrainingRecord | None:
    """The record of the expert where it is complete, without the checkpoints that a kill may have left beside it.

    Raises:
        ValueError: it was trained in another way, or something else lies there; see `check_unchanged`.
    """
    if overwrite:
        record = TrainingRecord.read(job.folder)
        record = record if record is not None and record.identity == job.identity else None
    else:
        record = check_unchanged(job.folder, job.identity)
    if record is not None:
        shutil.rmtree(checkpoints_of(job.folder), ignore_errors=True)
    return record


def train_job(
    base: Base, job: Job, plan: Plan, processes: Processes, on_step: Callable[[int, int], None]
) -> TrainingRecord:
    """Train one expert and write its folder in one step; continues from a checkpoint of a killed run.

    Raises:
        NotFinite: the loss or the gradient is NaN or infinite.
    """
    started = time.monotonic()
    try:
        with kept_random_state(), lent(base.model) as model, processes.alone():
            set_seed(plan.init_seed)
            peft_model = get_peft_model(model, with_targets(job.lora, model), revision=base.revision)
            try:
                outcome = fit(
                    peft_model,
                    base.tokenizer,
                    job.examples.dataset,
                    processes.localised(job.arguments),
                    on_step=on_step,
                    checkpoint=checkpoint_for(job, processes),
                    whole=processes.together,
                    writes=processes.is_alone_or_main,
                    **job.more(peft_model),
                )
                job.after(peft_model)
                record = record_of(job, outcome, peft_model, time.monotonic() - started)
                if processes.is_alone_or_main:
                    write_expert(peft_model, record, job.folder, outcome.tensors)
            finally:
                peft_model.unload()
    finally:
        if processes.together:
            base.forget()  # sharding replaced its weights
    return record


def checkpoint_for(job: Job, processes: Processes) -> Path | None:
    """The checkpoint to continue from; of processes that train together the first one looks, and all take its answer.

    A checkpoint is of as many processes as the trainer writes it with, so that after a change of their number the
    expert is trained anew; as it is with an accelerate that continues a sharded training with other weights.
    """
    folder, found = Path(job.arguments.output_dir), None
    if processes.is_alone_or_main:
        shared = {"processes": processes.count} if processes.together else {}
        prepare_checkpoints(folder, {**job.identity, **shared})
        found = newest_checkpoint(folder) if processes.can_continue else None
    return processes.from_main(found) if processes.together else found


def record_of(job: Job, outcome: Outcome, model: PeftModel, seconds: float) -> TrainingRecord:
    """What is written beside the weights."""
    return TrainingRecord(
        name=job.name,
        tasks=list(job.examples.tasks),
        identity=job.identity,
        steps=outcome.steps,
        tokens=outcome.tokens,
        rows=len(job.examples.dataset),
        seconds=round(seconds, 2),
        losses=outcome.losses,
        target_modules=sorted(model.peft_config["default"].target_modules),
        sources=list(job.examples.sources),
    )


def write_expert(model: PeftModel, record: TrainingRecord, folder: Path, tensors: Mapping | None = None) -> None:
    """Save the adapter and its record; then its checkpoints are not needed any more."""
    with new_folder(folder) as draft:
        model.save_pretrained(str(draft), state_dict=tensors)
        record.write(draft)
    shutil.rmtree(checkpoints_of(folder), ignore_errors=True)


def moved(bar: tqdm) -> Callable[[int, int], None]:
    """A function that sets a bar to (step, all steps)."""

    def on_step(step: int, steps: int) -> None:
        bar.total = steps
        bar.update(step - bar.n)

    return on_step
