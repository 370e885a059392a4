"""One plain PEFT LoRA: the first expert alone."""

from __future__ import annotations

from peft import PeftModel
from torch import nn

from .bases import sharing_copy


def plain_lora(base: nn.Module, folder: str, trainable: bool = False) -> PeftModel:
    """The base with the adapter of this folder, as PEFT loads it, in the dtype of the file."""
    options = {"is_trainable": trainable, "autocast_adapter_dtype": False}
    return PeftModel.from_pretrained(sharing_copy(base), folder, **options).train(trainable)
