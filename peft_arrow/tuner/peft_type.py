"""The PEFT type of routed LoRA, registered from outside PEFT.

`peft.utils.register_peft_method` refuses names that are not members of PEFT's own `PeftType`, and an Enum with members
cannot be extended. Nothing in PEFT, transformers or TRL ever calls `PeftType(...)`: all look-ups go through three
dictionaries by the string of the type, and `.value` and `str()` of the member are used. So an Enum of our own, put
into those dictionaries, is enough. This is the only place where peft-arrow reaches into PEFT's registry.
"""

from __future__ import annotations

import enum

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType


class ArrowPeftType(str, enum.Enum):  # noqa: UP042 - PEFT reads str() of a member as 'X.ARROW_LORA'
    """The one PEFT type that peft-arrow adds."""

    ARROW_LORA = "ARROW_LORA"


ARROW_LORA = getattr(PeftType, "ARROW_LORA", ArrowPeftType.ARROW_LORA)
PREFIX = "arrow_lora_"


def register(config_cls: type, model_cls: type) -> None:
    """Make PEFT know the type; running it twice (a module reload) is harmless.

    Raises:
        KeyError: another package has taken the name or the prefix.
    """
    taken = PEFT_TYPE_TO_CONFIG_MAPPING.get(ARROW_LORA)
    if taken is not None and taken.__module__ != config_cls.__module__:
        raise KeyError(f"PEFT type {ARROW_LORA.value} is already registered by {taken.__module__}.")
    others = {prefix for peft_type, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items() if peft_type != ARROW_LORA}
    if PREFIX in others:
        raise KeyError(f"The parameter prefix {PREFIX!r} is already registered by another PEFT method.")
    PEFT_TYPE_TO_CONFIG_MAPPING[ARROW_LORA] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[ARROW_LORA] = model_cls
    PEFT_TYPE_TO_PREFIX_MAPPING[ARROW_LORA] = PREFIX
