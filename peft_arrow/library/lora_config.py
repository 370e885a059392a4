"""What an adapter's config may say: a plain LoRA, in terms that PEFT will not choke on later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft import TaskType

from .adapter import Adapter
from .fields import short
from .patterns import check_pattern


REFUSED = {
    "use_dora": "DoRA rescales the whole weight by a learned magnitude",
    "lora_bias": "a bias on lora_B is not a low-rank update of the weight",
    "trainable_token_indices": "trained token embeddings replace rows of the embedding for every token",
    "target_parameters": "updates of parameters inside MoE layers are not updates of a linear module",
    "alora_invocation_tokens": "aLoRA applies only after its invocation tokens",
    "use_qalora": "QALoRA pools the input in groups",
    "use_bdlora": "BD-LoRA uses block-diagonal factors",
    "kasa_config": "KaSA inserts learned singular values",
    "velora_config": "VeLoRA changes how activations are stored for training",
    "monteclora_config": "MonteCLoRA samples its weights",
    "arrow_config": "it is a router of PEFT's Arrow, not an expert; pass the folder that holds task_0, task_1, ...",
    "megatron_config": "Megatron's parallel layers are not supported",
}
NAMES = (str, list, tuple, set, type(None))
CONFIG_TYPES = {
    "target_modules": NAMES,
    "exclude_modules": NAMES,
    "modules_to_save": (list, tuple, set, type(None)),
    "layers_to_transform": (int, list, tuple, type(None)),
    "layers_pattern": NAMES,
    "rank_pattern": (dict, type(None)),
    "alpha_pattern": (dict, type(None)),
    "lora_dropout": (int, float, type(None)),
    "use_rslora": (bool, type(None)),
    "layer_replication": (list, tuple, type(None)),
}
ENTRY_TYPES = {
    **dict.fromkeys(("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"), str),
    "layers_to_transform": int,
}
TASK_TYPES = tuple(task.value for task in TaskType)
MOST_LAYERS = 4096
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
KEPT_BASE_CHANGING_INITS = ("pissa", "olora")


def check_kind(name: str, source: str, config: Mapping[str, Any]) -> None:
    """Raise a `ValueError` that names the feature and the reason if the adapter is not a plain LoRA."""
    peft_type = str(getattr(config.get("peft_type"), "value", config.get("peft_type")))
    if peft_type == "ARROW_LORA":
        raise ValueError(
            f"adapter {name!r} ({source}): it is a saved routed model, not an expert; load it with "
            "PeftModel.from_pretrained(base, folder)."
        )
    if peft_type != "LORA":
        raise ValueError(
            f"adapter {name!r} ({source}): peft_type is {peft_type!r}; only 'LORA' adapters can be routed."
        )
    for option, reason in REFUSED.items():
        if config.get(option):
            raise ValueError(f"adapter {name!r} ({source}): {option}={config[option]!r} is not supported: {reason}.")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(BASE_CHANGING_INITS) and init not in KEPT_BASE_CHANGING_INITS:
        raise ValueError(
            f"adapter {name!r} ({source}): init_lora_weights={init!r} changed the base weights in training, and the "
            "adapter's files do not tell how; save it with path_initial_model_for_weight_conversion, which makes a "
            "plain LoRA of it."
        )


def check_config(adapter: Adapter) -> None:
    """Raise a `ValueError` if the adapter's config is not that of a plain LoRA; no file is read.

    A config from elsewhere may say anything; what PEFT would choke on later is refused here, by name.
    """
    config = adapter.config
    check_kind(adapter.name, adapter.source, config)
    for field, types in CONFIG_TYPES.items():
        if not isinstance(config.get(field), types):
            allowed = ", ".join("None" if kind is type(None) else kind.__name__ for kind in types)
            raise ValueError(
                f"{adapter.where}: its config has {field}={config[field]!r}; allowed types are {allowed}."
            )
    for field, kind in ENTRY_TYPES.items():
        values = config.get(field)
        if isinstance(values, (list, tuple, set)) and not all(type(value) is kind for value in values):
            raise ValueError(f"{adapter.where}: its config has {field}={short(values)}; entries are {kind.__name__}.")
    if not 0 <= (config.get("lora_dropout") or 0) < 1:
        raise ValueError(
            f"{adapter.where}: its config has lora_dropout={config['lora_dropout']!r}; it must be in [0, 1)."
        )
    if adapter.task_type is not None and adapter.task_type not in TASK_TYPES:
        raise ValueError(
            f"{adapter.where}: its config has task_type={short(adapter.task_type)}; allowed are "
            f"{', '.join(TASK_TYPES)}."
        )
    pairs = config.get("layer_replication") or []
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 and _are_indices(pair) for pair in pairs):
        raise ValueError(
            f"{adapter.where}: its config has layer_replication={short(pairs)}; it must be a list of pairs of layers."
        )
    _check_patterns(adapter)


def _are_indices(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST_LAYERS for value in values)


def _check_patterns(adapter: Adapter) -> None:
    config = adapter.config
    patterns = [config.get("target_modules"), config.get("exclude_modules")]
    for field in ("layers_pattern", "modules_to_save"):  # PEFT matches names of modules_to_save as patterns, too
        named = config.get(field)
        patterns += [named] if isinstance(named, str) else list(named or [])
    patterns += [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]
    for pattern in (pattern for pattern in patterns if isinstance(pattern, str)):
        try:
            check_pattern(pattern)
        except ValueError as error:
            raise ValueError(f"{adapter.where}: its config has the pattern {short(pattern)}: {error}.") from error
