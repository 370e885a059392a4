"""Deliberate damage, to see that the suite notices."""

from __future__ import annotations

from typing import Any


def zero_loaded_prototypes() -> None:
    """Checkpoints lose their prototypes on the way in: every expert then has the same score for every token."""
    import peft.peft_model

    load = peft.peft_model.load_peft_weights

    def load_without_prototypes(*args: Any, **kwargs: Any) -> dict[str, Any]:
        weights = load(*args, **kwargs)
        return {name: w.zero_() if "arrow_lora_router" in name else w for name, w in weights.items()}

    peft.peft_model.load_peft_weights = load_without_prototypes
