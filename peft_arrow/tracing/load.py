"""What is routed: a library, adapters, or a routed model that was saved."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..library.library import AdapterLibrary
from ..tuner import ArrowLoraModel


CONFIG_NAME = "adapter_config.json"
ROUTED_TYPE = "ARROW_LORA"


class RoutedSource:
    """Adapters that are looked up, and the base model that they are of; weights are read by `on`.

    Args:
        refs (`Sequence[str]`): references to adapters or a library, or the folder of one saved routed model.
        base (`str`, *optional*): the base model; by default what they name.
        token, revision (`str`, *optional*): for the Hub; `@revision` in a reference wins.

    Raises:
        ValueError: nothing readable is there, or the adapters do not go together.
    """

    def __init__(
        self, refs: Sequence[str], base: str | None = None, *, token: str | None = None, revision: str | None = None
    ) -> None:
        self.saved = refs[0] if len(refs) == 1 and _is_routed_model(refs[0]) else None
        self.library = None
        if self.saved is None:
            self.library = AdapterLibrary.from_pretrained(list(refs), base, token=token, revision=revision)
        self.base = base or self._named_base()

    def _named_base(self) -> str:
        if self.library is not None:
            return self.library.base_model_name_or_path
        named = _config_of(self.saved).get("base_model_name_or_path")
        if not named:
            raise ValueError(f"{self.saved!r} does not name its base model; give it.")
        return named

    def on(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        options: Mapping[str, Any],
        fit_data: Mapping[str, Any] | None = None,
    ) -> PeftModel:
        """The routed model, for inference.

        Args:
            base (`PreTrainedModel`): the base, loaded.
            tokenizer (`PreTrainedTokenizerBase`): of the base.
            options (`Mapping[str, Any]`): as for `set_router`; they win over what was saved.
            fit_data (`Mapping[str, Any]`, *optional*): expert -> rows, for a router that needs data.

        Raises:
            ValueError: an option or a value is not allowed, or the router needs data and none is there.
        """
        if self.library is not None:
            model = ArrowLoraModel.from_pretrained(base, self.library)
        else:
            model = PeftModel.from_pretrained(base, self.saved).eval()
        options = dict(options)
        if fit_data:
            model.fit_router(options.get("router", "arrow"), fit_data, tokenizer=tokenizer)
        is_new = self.library is not None and options.get("calibrated") is True
        if is_new:  # nothing is stored yet
            options.pop("calibrated")
        if options:
            model.set_router(**options)
        if is_new:
            model.calibrate_router()
        return model

    def own_experts(self, tasks: Iterable[str], experts: Sequence[str]) -> dict[str, str]:
        """Task -> the expert that was made for it: of the same name, or the only one whose record names the task."""
        made_for: dict[str, list[str]] = {}
        for name, adapter in (self.library or {}).items():
            for task in (adapter.origin.task or "").split(", "):
                made_for.setdefault(task, []).append(name)
        own = {}
        for task in dict.fromkeys(tasks):
            named = [task] if task in experts else made_for.get(task, [])
            own |= {task: named[0]} if len(named) == 1 else {}
        return own


def _is_routed_model(reference: str) -> bool:
    return (Path(reference).expanduser() / CONFIG_NAME).is_file() and _config_of(reference).get(
        "peft_type"
    ) == ROUTED_TYPE


def _config_of(folder: str) -> dict[str, Any]:
    try:
        config = json.loads((Path(folder).expanduser() / CONFIG_NAME).read_text(encoding="utf-8"))
    except ValueError:  # whoever reads it as an adapter says what is wrong
        return {}
    return config if isinstance(config, dict) else {}
