"""The options of `evaluate_library`: how much is judged, and how rows are read."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from .batches import TOKEN_BUDGET
from .statistics import DRAWS


@dataclass(frozen=True)
class JudgeOptions:
    """How much is judged, and how.

    Args:
        controls (`bool`): add the controls that were not asked for.
        top_k (`int`): experts a token, where a method says nothing else.
        seeds (`int`): runs of random routing.
        lora_seeds (`int`): runs of random LoRAs.
        generate (`bool`): write answers to rows without options, for the metrics; the loss needs none.
        max_new_tokens (`int`): most tokens of an answer.
        truncate (`bool`): cut prompts that do not fit on the left; otherwise they are an error.
        max_rows (`int`, *optional*): judge at most so many rows a task, taken evenly.
        selection_rows (`int`): rows a task for selection, and judged rows a task that each expert is judged on alone;
            0 leaves both out.
        traced_rows (`int`): rows of a task whose routing is counted.
        batch_size (`int`, *optional*): most rows of a batch.
        token_budget (`int`): most tokens of a batch, padding included.
        draws (`int`): bootstrap resamples.

    Raises:
        ValueError: a number that is too small, or something else than a whole number.
    """

    controls: bool = True
    top_k: int = 4
    seeds: int = 3
    lora_seeds: int = 1
    generate: bool = True
    max_new_tokens: int = 64
    truncate: bool = False
    max_rows: int | None = None
    selection_rows: int = 16
    traced_rows: int = 8
    batch_size: int | None = None
    token_budget: int = TOKEN_BUDGET
    draws: int = DRAWS

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("selection_rows", "traced_rows") else 1
            if isinstance(field.default, bool):
                if not isinstance(value, bool):
                    raise ValueError(f"{field.name}={value!r} is not allowed; it is True or False.")
            elif value is None and field.default is None:
                continue
            elif isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{field.name}={value!r} is not allowed; it is a whole number of at least {least}.")

    def mark(self) -> dict[str, Any]:
        """What the result of a row depends on, beside the method."""
        return {"generate": self.generate, "max_new_tokens": self.max_new_tokens, "truncate": self.truncate}


def make_options(given: dict[str, Any]) -> JudgeOptions:
    """Options with defaults.

    Raises:
        TypeError: an unknown name.
        ValueError: a value that is not allowed.
    """
    allowed = [field.name for field in fields(JudgeOptions)]
    unknown = [name for name in given if name not in allowed]
    if unknown:
        raise TypeError(f"evaluate_library got an unknown argument {unknown[0]!r}; allowed are {', '.join(allowed)}.")
    return JudgeOptions(**given)
