"""One run of TRL's SFTTrainer on a PEFT model: quiet, resumable, stopped by a loss that is not finite."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer import utils as trl_utils

from .errors import NotFinite
from .reading import without_bars


@dataclass(frozen=True)
class Outcome:
    """What a run of the trainer did.

    Args:
        steps (`int`): optimizer steps, those before a restart included.
        tokens (`int`): tokens without padding.
        losses (`list[float]`): as logged.
        tensors (`dict`, *optional*): the whole state dict, where it was sharded.
    """

    steps: int
    tokens: int
    losses: list[float]
    tensors: dict[str, torch.Tensor] | None = None


class Watch(TrainerCallback):
    """Counts steps, stops at a loss or gradient that is not finite, and keeps no checkpoint of the last step.

    A trainer that goes on from such a checkpoint makes one step too many, and the expert itself is written next.
    """

    def __init__(self, on_step: Callable[[int, int], None]) -> None:
        self._on_step = on_step

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._on_step(state.global_step, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._on_step(state.global_step, state.max_steps)
        self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        if state.global_step >= state.max_steps:
            control.should_save = False

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        for name in ("loss", "grad_norm"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise NotFinite(f"{name} is {value} at step {state.global_step}; a lower learning_rate may help.")


def fit(
    model: PeftModel,
    tokenizer: Any,
    dataset: Dataset,
    arguments: SFTConfig,
    *,
    on_step: Callable[[int, int], None] = lambda step, steps: None,
    collator: Callable | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    checkpoint: Path | None = None,
    whole: bool = False,
    writes: bool = True,
) -> Outcome:
    """Train, from a checkpoint where there is one.

    Args:
        model (`PeftModel`): with the adapter that is trained.
        tokenizer: of the base.
        dataset (`Dataset`): in a form that TRL takes.
        arguments (`SFTConfig`): of the trainer.
        on_step (`Callable`): called with (step, all steps).
        collator (`Callable`, *optional*): in the place of TRL's.
        optimizer (`torch.optim.Optimizer`, *optional*): in the place of the one that the arguments name.
        checkpoint (`Path`, *optional*): of the same training, to continue from.
        whole (`bool`): gather the trained weights of a sharded model.
        writes (`bool`): this process writes the adapter of a checkpoint; of those that train together only one does.

    Raises:
        NotFinite: the loss or the gradient is NaN or infinite.
    """
    model.save_pretrained = _quiet(model.save_pretrained, writes)
    with without_bars():
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            processing_class=tokenizer,
            data_collator=collator,
            optimizers=(optimizer, None),
            callbacks=[Watch(on_step)],
        )
    trainer.remove_callback(PrinterCallback)
    with scoring_labels_only():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.state
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    tensors = _gathered(trainer) if whole else None
    return Outcome(state.global_step, int(state.num_input_tokens_seen), losses, tensors)


@contextlib.contextmanager
def scoring_labels_only() -> Iterator[None]:
    """Have TRL's language-model head score the labelled positions alone on a CPU too, as it does on GPUs.

    Elsewhere TRL 1.16 scores every position, because shapes that change would be compiled again there. A CPU compiles
    nothing, and where completions are short and the vocabulary is large, the head took half of a step. The loss is
    the same: positions without a label count 0. A TRL without the switch is left as it is.
    """
    switch = getattr(trl_utils, "_use_triton", None)
    if switch is None:
        yield
        return
    trl_utils._use_triton = lambda device: device.type == "cpu" or switch(device)
    try:
        yield
    finally:
        trl_utils._use_triton = switch


def _gathered(trainer: SFTTrainer) -> dict[str, torch.Tensor]:
    """The whole tensors of a sharded model, on the CPU of the first process; of FSDP2 only those that were trained."""
    accelerator = trainer.accelerator
    if not accelerator.is_fsdp2:
        return accelerator.get_state_dict(trainer.model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(trainer.model, options=options)


def _quiet(save: Callable, writes: bool) -> Callable:
    """PEFT's default asks the Hub for the base's config, to see whether its vocabulary changed.

    Under FSDP the trainer has every process write the adapter, into one file.
    """
    fixed = {"save_embedding_layers": False, **({} if writes else {"is_main_process": False})}
    return lambda *args, **kwargs: save(*args, **{**fixed, **kwargs})
