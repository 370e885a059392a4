"""The arguments that all trainings take, turned into what they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from .base import Base
from .jobs import Plan
from .processes import Processes
from .recipe import INIT_SEED, sft_arguments


@dataclass(frozen=True)
class Setup:
    """A base, how experts are trained on it, the processes of this launch, and whether bars are shown."""

    base: Base = field(repr=False)
    plan: Plan
    processes: Processes = field(repr=False)
    progress: bool = True


def set_up(
    base: PreTrainedModel | str | PathLike,
    *,
    sft_config: SFTConfig | Mapping[str, Any] | None = None,
    lora_config: LoraConfig | Mapping[str, Any] | None = None,
    init_seed: int = INIT_SEED,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base_model_kwargs: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Setup:
    """Open a base and make a plan; `train_adapter` tells what the arguments mean. Nothing is loaded yet.

    Raises:
        ValueError: the launch shards the base and cannot do so with this base or config; or the config shards it.
    """
    plan = Plan(sft_config, lora_config, init_seed, overwrite)
    setup = Setup(Base(base, tokenizer, base_model_kwargs), plan, Processes(), progress)
    arguments = sft_arguments(sft_config, Path())
    for name in ("fsdp", "deepspeed"):
        if getattr(arguments, name, None):
            raise ValueError(f"sft_config has {name}={getattr(arguments, name)!r}; give it in accelerate's config.")
    if setup.processes.together:
        setup.base.check_loadable()
        setup.processes.share_of_step(arguments)
    return setup
