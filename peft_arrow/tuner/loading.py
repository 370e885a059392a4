"""From a base and references to a routed model, in one call."""

from __future__ import annotations

from dataclasses import fields
from os import PathLike, fspath
from typing import Any

from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from ..library.adapter import AdapterRef, list_locations
from .config import ArrowLoraConfig
from .store_options import check_paging


AUTO_CLASSES = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": AutoModel,
}
NOT_OPTIONS = ("adapters", "peft_type", "auto_mapping", "peft_version", "inference_mode", "num_experts")


def from_pretrained(
    base: nn.Module | str | PathLike,
    adapters: Any,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    base_model_kwargs: dict[str, Any] | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    autocast_adapter_dtype: bool = True,
    expert_store: str | PathLike | None = None,
    hot_experts: int = 64,
    **options: Any,
) -> PeftModel:
    """Route a base model between LoRA adapters.

    Args:
        base (`nn.Module`, `str` or `PathLike`): a model, or the Hub id or folder of one.
        adapters: a list of references, a dict name -> reference, or a reference to a library.
        adapter_name (`str`): the PEFT name of the library of experts.
        is_trainable (`bool`): whether the experts can be trained; otherwise the model is for inference.
        base_model_kwargs (`dict`, *optional*): passed to the base's `from_pretrained` when `base` is a string.
        token, revision, cache_dir, local_files_only: for adapters on the Hub; `@revision` in a reference wins.
        autocast_adapter_dtype (`bool`):
            As in PEFT, experts on a bfloat16 or float16 base are kept in float32; False keeps them in the base's
            dtype, which takes half the memory.
        expert_store, hot_experts:
            `store` and `hot_experts` of [`ArrowLoraModel.page_experts`], from the start: what is read goes there.
        options: any field of [`ArrowLoraConfig`], such as `top_k`, `router`, `aggregation`.

    Returns:
        `PeftModel`: of the task type of the adapters; its `base_model` is an [`ArrowLoraModel`].

    Raises:
        TypeError: an unknown option.
        ValueError: an adapter cannot be read or does not fit; the base is then as it was.
    """
    _check_arguments(adapters, options)
    defaults = AdapterRef("", revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    located = list_locations(adapters, defaults)
    config = ArrowLoraConfig(adapters=located, inference_mode=not is_trainable, **options)
    if expert_store is not None:
        config._paging = check_paging(expert_store, hot_experts, "expert_store", autocast_adapter_dtype)
    model = _load_base(base, config.task_type, base_model_kwargs or {})
    _check_bare(model)
    routed = get_peft_model(model, config, adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
    return routed if is_trainable else routed.eval()


def _check_arguments(adapters: Any, options: dict[str, Any]) -> None:
    allowed = [f.name for f in fields(ArrowLoraConfig) if f.name not in NOT_OPTIONS]
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise TypeError(f"from_pretrained got an unknown argument {unknown[0]!r}; allowed are {', '.join(allowed)}.")
    if adapters is None:
        raise ValueError("adapters=None is not allowed; pass a list of references or a dict name -> reference.")


def _load_base(base: nn.Module | str | PathLike, task_type: str | None, kwargs: dict[str, Any]) -> nn.Module:
    if isinstance(base, nn.Module):
        if kwargs:
            raise ValueError(
                f"base_model_kwargs={kwargs!r} goes with a base given by name; this base is already loaded."
            )
        return base
    if not isinstance(base, (str, PathLike)):
        raise TypeError(f"base={base!r} is not allowed; it is a model, a Hub id or a folder.")
    if task_type is None:
        raise ValueError("The adapters do not say their task type; pass task_type, or a loaded model as base.")
    return AUTO_CLASSES[str(getattr(task_type, "value", task_type))].from_pretrained(fspath(base), **kwargs)


def _check_bare(model: nn.Module) -> None:
    if isinstance(model, PeftModel):
        raise ValueError(
            "base is already a PeftModel; pass the base model itself (model.unload() gives it back), or use "
            "model.add_expert(ref) to add to a routed model."
        )
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "base already carries PEFT adapters, whose updates would be routed around; remove them first "
            "(model.delete_adapter(name), or load the base anew)."
        )
