"""The base model of a run: loaded once, when the first expert needs it, and given back as it was."""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..library.base_ids import is_local_path
from ..library.reading import READ_ERRORS
from .reaching import commit_of, unreadable


HUB_OPTIONS = ("token", "cache_dir", "local_files_only")


class Base:
    """A base model and its tokenizer.

    Args:
        base (`PreTrainedModel` or `str`): the model, or its Hub id or folder, which is loaded when it is needed.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): by default that of the base's folder or Hub id.
        model_kwargs (`Mapping`, *optional*): for loading: `dtype`, `device_map`, `revision` ...
    """

    def __init__(
        self,
        base: PreTrainedModel | str | PathLike,
        tokenizer: PreTrainedTokenizerBase | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(base, (PreTrainedModel, str, PathLike)):
            raise TypeError(f"base is a {type(base).__name__}; allowed are a PreTrainedModel, a Hub id and a folder.")
        self._given, self._tokenizer, self._model_kwargs = base, tokenizer, dict(model_kwargs or {})
        self.name = base.config._name_or_path if isinstance(base, PreTrainedModel) else str(base)

    @cached_property
    def revision(self) -> str | None:
        """The commit of the revision that was asked for, of which all files are taken; None where none was asked for.

        Raises:
            ValueError: the base is neither a folder nor on the Hub, or a folder, which has no revisions.
            ConnectionError: the Hub cannot be reached.
        """
        asked = self._model_kwargs.get("revision")
        if isinstance(self._given, PreTrainedModel):
            return asked
        if Path(self.name).is_dir() or is_local_path(self.name):
            if not Path(self.name).exists():
                raise ValueError(f"base={self.name!r} cannot be loaded: there is no such folder.")
            if asked is not None:
                raise ValueError(f"revision={asked!r} is for a base on the Hub; base={self.name!r} is a folder.")
            return None
        options = {name: self._model_kwargs[name] for name in HUB_OPTIONS if name in self._model_kwargs}
        try:
            commit = commit_of(self.name, asked, options)
        except READ_ERRORS as error:
            raise unreadable(*_told(self.name), error) from error
        return None if asked is None else commit or asked

    @property
    def identity(self) -> dict[str, str]:
        """Name, and the revision and dtype that were asked for: what of the base decides the result."""
        dtype = str(self._model_kwargs.get("dtype", "auto")).removeprefix("torch.")
        told = {"base_revision": self.revision} | ({"base_dtype": dtype} if dtype != "auto" else {})
        return {"base_model": self.name, **{name: value for name, value in told.items() if value is not None}}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with the end token for padding where it has none of its own."""
        if self._tokenizer is None and not self.name:
            raise ValueError("base has no name to find its tokenizer by; pass tokenizer=.")
        found = self._tokenizer
        if found is None:
            names = [name for name in (*HUB_OPTIONS, "trust_remote_code") if name in self._model_kwargs]
            found = self._load(AutoTokenizer, {name: self._model_kwargs[name] for name in names})
        if found.pad_token is None:
            found = copy.deepcopy(found)
            found.pad_token = found.eos_token
        return found

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model; a name is loaded at the first use, by default in the checkpoint's own dtype."""
        if isinstance(self._given, PreTrainedModel):
            return self._given
        return self._load(AutoModelForCausalLM, {"dtype": "auto", **self._model_kwargs})

    def load(self) -> None:
        """Load the model now, so that one that cannot be had is one error, and not one of every expert."""
        self.model  # noqa: B018  (kept by the property)

    def _load(self, auto_class: type, options: Mapping[str, Any]) -> Any:
        revision = {} if self.revision is None else {"revision": self.revision}
        try:
            return auto_class.from_pretrained(self.name, **{**options, **revision})
        except (*READ_ERRORS, SafetensorError) as error:
            raise unreadable(*_told(self.name), error) from error

    def check_loadable(self) -> None:
        """A `ValueError` where the base was given as a model, which cannot be loaded anew after `forget`."""
        if isinstance(self._given, PreTrainedModel):
            raise ValueError("base is a model; under FSDP or DeepSpeed pass its Hub id or folder, to be loaded anew.")

    def forget(self) -> None:
        """Drop the loaded model and free its memory; the next use loads it again."""
        self.check_loadable()
        self.__dict__.pop("model", None)
        clear_device_cache(garbage_collection=True)


def _told(name: str) -> tuple[str, str]:
    return f"base={name!r}", "cannot be loaded as a folder or from the Hub"


@contextlib.contextmanager
def without_renaming_notices() -> Iterator[None]:
    """transformers 5.23 renames gradient checkpointing; peft and trl use the old names, and no user can help it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
        yield


def _is_checkpointing(model: PreTrainedModel) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextlib.contextmanager
def lent(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model for one training; afterwards everything that a trainer sets on a base is as it was.

    PEFT freezes the weights; TRL writes a forward of its own, padding ids and tags on the model; the trainer sets
    `use_cache`, gradient checkpointing and the training mode.
    """
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = [(module, module.training) for module in model.modules()]
    configs = [config for config in (model.config, model.generation_config) if config is not None]
    values = [copy.deepcopy(config.__dict__) for config in configs]
    own_forward, tags = model.__dict__.get("forward"), copy.copy(model.model_tags)
    checkpointed = _is_checkpointing(model)
    hooks = model.get_input_embeddings()._forward_hooks
    own_hooks = set(hooks)
    try:
        with without_renaming_notices():
            yield model
    finally:
        model.__dict__.pop("forward", None)
        if own_forward is not None:
            model.forward = own_forward
        if not checkpointed and _is_checkpointing(model):
            with without_renaming_notices():
                model.gradient_checkpointing_disable()
        for key in set(hooks) - own_hooks:  # trl and the trainer both add one, and only the last could be undone
            del hooks[key]
        for config, before in zip(configs, values, strict=True):
            config.__dict__.clear()
            config.__dict__.update(before)
        model.model_tags = tags
        for module, mode in modes:
            module.training = mode
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained.get(name, parameter.requires_grad))
            parameter.grad = None


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Put the random states of Python, numpy and torch back, on every device."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
