"""The paper's recipe for a LoRA (arXiv 2405.11157, sections 5 and 9), and how a user's configs change it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from peft import LoraConfig
from trl import SFTConfig

from .base import without_renaming_notices


INIT_SEED = 42
# transformers 5 takes a share of the steps where version 4 had an argument of its own
WARMUP = "warmup_steps" if Version(transformers.__version__) >= Version("5") else "warmup_ratio"
SFT_RECIPE = {
    "learning_rate": 1e-4,
    "lr_scheduler_type": "linear",
    WARMUP: 0.06,
    "weight_decay": 0.0,
    "max_grad_norm": 0.1,
    "num_train_epochs": 5,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "max_length": 2112,
    "seed": 42,
    "gradient_checkpointing": False,
    "save_strategy": "steps",
    "save_steps": 100,
    "logging_steps": 1,
    "report_to": "none",
}
LORA_RECIPE = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.05, "task_type": "CAUSAL_LM"}
# What a run of ours needs, whatever is asked for: the newest checkpoint alone is kept, NaN is seen, one bar is shown.
FORCED = {
    "logging_nan_inf_filter": False,
    "include_num_input_tokens_seen": "non_padding",
    "save_total_limit": 1,
    "disable_tqdm": True,
    "load_best_model_at_end": False,
    "push_to_hub": False,
}
# The fields of SFTConfig that change what is learnt; those of files, logs and devices do not.
TELLING = (
    "max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps learning_rate "
    "lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio weight_decay adam_beta1 adam_beta2 adam_epsilon "
    "max_grad_norm optim optim_args seed data_seed bf16 fp16 max_length packing packing_strategy "
    "completion_only_loss assistant_only_loss loss_type dataset_text_field label_smoothing_factor "
    "neftune_noise_alpha eos_token pad_token chat_template_path shuffle_dataset group_by_length"
).split()


def sft_arguments(
    sft_config: SFTConfig | Mapping[str, Any] | None, folder: Path, steps: int | None = None
) -> SFTConfig:
    """The trainer's arguments: the recipe with the fields of a mapping in their place, or the user's config as it is.

    Args:
        sft_config (`SFTConfig` or `Mapping`, *optional*):
            a mapping changes fields of the recipe; an `SFTConfig` takes its place whole, with its own defaults.
        folder (`Path`): where checkpoints go; takes the place of `output_dir`.
        steps (`int`, *optional*): optimizer steps; takes the place of `max_steps`.

    Raises:
        ValueError: a field that SFTConfig does not have.
    """
    own = {**FORCED, "output_dir": str(folder)} | ({"max_steps": steps} if steps is not None else {})
    if isinstance(sft_config, SFTConfig):
        arguments = copy.copy(sft_config)
        for name, value in own.items():
            setattr(arguments, name, value)
        return arguments
    wanted = dict(sft_config or {})
    unknown = sorted(set(wanted) - set(SFTConfig.__dataclass_fields__))
    if unknown:
        raise ValueError(f"sft_config holds {unknown[0]!r}, which is no field of trl.SFTConfig.")
    values = {**SFT_RECIPE, **wanted, **own}
    on_cpu = values.get("use_cpu", False) or not torch.accelerator.is_available()
    if on_cpu:
        values.setdefault("bf16", False)
        values.setdefault("use_cpu", True)
    with without_renaming_notices():
        return SFTConfig(**values)


def lora_arguments(lora_config: LoraConfig | Mapping[str, Any] | None) -> LoraConfig:
    """The adapter's config, before the base is known: the recipe with fields of a mapping, or a copy of the user's.

    Raises:
        ValueError: a field that LoraConfig does not have, or a config of another PEFT method.
    """
    if isinstance(lora_config, LoraConfig):
        return copy.deepcopy(lora_config)
    if lora_config is not None and not isinstance(lora_config, Mapping):
        raise ValueError(f"lora_config is a {type(lora_config).__name__}; allowed are a LoraConfig and a dict.")
    wanted = dict(lora_config or {})
    unknown = sorted(set(wanted) - set(LoraConfig.__dataclass_fields__))
    if unknown:
        raise ValueError(f"lora_config holds {unknown[0]!r}, which is no field of peft.LoraConfig.")
    return LoraConfig(**{**LORA_RECIPE, **wanted})


def telling(arguments: SFTConfig, config: Any) -> dict[str, Any]:
    """What of two configs decides the result, as JSON has it: `sft.<field>` and `lora.<field>`."""
    usual = type(config)().to_dict()
    fields = {f"lora.{name}": _plain(value) for name, value in config.to_dict().items() if _tells(name, value, usual)}
    found = {name: getattr(arguments, name) for name in TELLING if hasattr(arguments, name)}
    return {**{f"sft.{name}": _plain(value) for name, value in found.items()}, **fields}


def _tells(name: str, value: Any, usual: Mapping[str, Any]) -> bool:
    """Fields at PEFT's default are left out: a later version of PEFT that has more fields changes nothing."""
    return name in LORA_RECIPE or (value != usual[name] and name not in ("inference_mode", "peft_version"))


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    inner = getattr(value, "value", value)
    return inner if isinstance(inner, (str, int, float, bool, type(None))) else str(inner)
