"""Loading over an adapter that is there: PEFT reads the file's weights then, and not the config that explains them.

For LoRA this keeps a stale alpha. Here it would also keep stale names and ranks: 2 + 6 over 6 + 2 has the same shapes.
So a file whose experts differ replaces the adapter instead of pouring its weights into it. `PeftModel.load_adapter` is
wrapped for that, because nothing of a tuner is told which file the weights are from. With `peft_type.py` this is all
that reaches into PEFT.
"""

from __future__ import annotations

import functools

from peft import PeftConfig, PeftModel
from peft.utils import load_peft_weights

from .config import ArrowLoraConfig


def follow_config_on_load() -> None:
    """Wrap `PeftModel.load_adapter`, once; other PEFT methods are passed on untouched."""
    load_adapter = PeftModel.load_adapter
    if hasattr(load_adapter, "_peft_arrow"):
        return

    @functools.wraps(load_adapter)
    def load_adapter_and_config(self, model_id, adapter_name, *args, **kwargs):
        known = self.peft_config.get(adapter_name)
        if not isinstance(known, ArrowLoraConfig):
            return load_adapter(self, model_id, adapter_name, *args, **kwargs)
        hub_options, _ = self._split_kwargs(dict(kwargs))
        if not _differs(PeftConfig.from_pretrained(model_id, **hub_options), known):
            return load_adapter(self, model_id, adapter_name, *args, **kwargs)
        load_peft_weights(model_id, device="cpu", **hub_options)  # raises now, while the old adapter is still there
        active = list(self.active_adapters)
        self.delete_adapter(adapter_name)
        result = load_adapter(self, model_id, adapter_name, *args, **kwargs)
        if adapter_name in active:
            self.set_adapter(adapter_name)
        return result

    load_adapter_and_config._peft_arrow = True
    PeftModel.load_adapter = load_adapter_and_config


def _differs(stored: PeftConfig, known: ArrowLoraConfig) -> bool:
    fields = ("expert_names", "layouts", "expert_layouts")
    return any(getattr(stored, name, None) != getattr(known, name) for name in fields)
