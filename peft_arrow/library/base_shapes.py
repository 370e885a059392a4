"""What is known of a base model without loading it: the shapes of its linear modules, which judge what fits it."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from peft.tuners.tuners_utils import clone_module, replicate_layers
from torch import nn

from .base_ids import is_local_path, is_same_base, normalise_base
from .base_modules import BaseModules
from .retrying import CLIENT_ERROR


__all__ = ["BaseShapes", "is_local_path", "is_same_base", "normalise_base"]

TASK_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
MOST_LAYERS = 4096
# What reading a config and making an empty model of it can raise: it may be of a stranger and say anything.
BASE_ERRORS = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError, ArithmeticError),
    *(AssertionError, StrictDataclassError, CLIENT_ERROR),
)


class BaseShapes:
    """The linear modules of a base model and what an adapter's config targets in it.

    Made by `BaseShapes.of`, once for many adapters.

    Args:
        name (`str`, *optional*): Hub id or folder.
        source (`nn.Module` or `PretrainedConfig`, *optional*): the model, or the config to make empty models of.
        reason (`str`, *optional*): why nothing is known of the shapes, where there is no source.
    """

    def __init__(self, name: str | None, source: Any = None, reason: str | None = None) -> None:
        self.name, self.reason = name, reason
        self._source = source
        self.is_loaded = isinstance(source, nn.Module)
        self._base = BaseModules(source) if self.is_loaded else None
        self._others: dict[str, BaseShapes] = {}
        self._lock = threading.RLock()

    @classmethod
    def of(
        cls,
        base: Any,
        *,
        token: str | bool | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
    ) -> BaseShapes:
        """What is known of a base model; of an id or a folder only `config.json` is read, no weights and no code.

        Args:
            base (`nn.Module`, `str`, `PathLike` or `BaseShapes`): a model, or a Hub id or folder.
            token, revision, cache_dir, local_files_only: for the Hub.

        Returns:
            `BaseShapes`: where the config cannot be had, one that knows the name alone and the reason.

        Raises:
            TypeError: `base` is something else.
        """
        if isinstance(base, cls):
            return base
        if isinstance(base, nn.Module):
            model = base.get_base_model() if isinstance(base, PeftModel) else base
            return cls(getattr(model, "name_or_path", None) or None, model)
        if not isinstance(base, (str, PathLike)):
            raise TypeError(f"base={base!r} is not allowed; pass a model, a Hub id, a folder or None.")
        name = os.fspath(base)
        options = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        try:
            folder = os.path.expanduser(name) if name.startswith("~") else name
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
            _check_size(config.to_dict())
        except BASE_ERRORS as error:
            return cls(name, reason=_short(error))
        return cls(name, config)

    def for_task(self, task_type: str | None) -> BaseShapes:
        """The shapes as the model class of a task has them, `CAUSAL_LM` by default; a loaded model is what it is."""
        if self._source is None or self.is_loaded:
            return self
        task = task_type if task_type in TASK_CLASSES else "CAUSAL_LM"
        with self._lock:
            if task not in self._others:
                self._others[task] = _empty_model(self.name, self._source, TASK_CLASSES[task])
        return self._others[task]

    def replicated(self, replication: Any) -> BaseShapes:
        """The shapes of the base with its layers stacked as `layer_replication` says.

        Raises:
            ValueError: the base cannot be stacked so.
        """
        if self._base is None:
            return self
        key = repr(replication)
        with self._lock:
            if key not in self._others:
                model = clone_module(self._base.model, share_weights=True)
                try:
                    replicate_layers(model, [tuple(pair) for pair in replication])
                except (ValueError, TypeError, LookupError, AttributeError) as error:
                    raise ValueError(f"layer_replication={replication!r} does not fit the base: {error}") from error
                shapes = BaseShapes(self.name, model)
                shapes.is_loaded = self.is_loaded
                self._others[key] = shapes
        return self._others[key]

    @property
    def is_known(self) -> bool:
        """Whether there are shapes to compare with."""
        return self._base is not None

    @property
    def modules(self) -> dict[str, tuple[int, int]] | None:
        """(in_features, out_features) of every linear module by name; None where nothing is known."""
        if self._base is None:
            return None
        return {name: found for name in self._base.modules if (found := self.features(name)) is not None}

    def features(self, module: str) -> tuple[int, int] | None:
        """(in_features, out_features) of a linear module; None where there is none of that name."""
        return None if self._base is None else self._base.features(module)

    def kind(self, module: str) -> str | None:
        """The class of a module of any kind; None where there is none of that name."""
        found = None if self._base is None else self._base.modules.get(module)
        return None if found is None else type(found).__name__

    def parameter(self, path: str) -> torch.Tensor | None:
        """The base's parameter of that name; on the meta device where no weights are there."""
        return None if self._base is None else self._base.parameter(path)

    def targets(self, config: Mapping[str, Any]) -> set[str]:
        """Names of the modules that PEFT would adapt for an adapter's config; of a base whose shapes are known.

        Raises:
            ValueError: PEFT refuses the config's options.
        """
        return self._base.targets(config)


def _empty_model(name: str | None, config: Any, auto_class: str) -> BaseShapes:
    try:
        with torch.device("meta"):
            model = getattr(transformers, auto_class).from_config(config, attn_implementation="eager")
    except BASE_ERRORS as error:
        return BaseShapes(name, reason=f"{auto_class} cannot be made of its config: {_short(error)}")
    shapes = BaseShapes(name, model)
    shapes.is_loaded = False
    return shapes


def _check_size(content: Any) -> None:
    """Refuse counts of layers and experts that would never be done being made."""
    for key, value in content.items() if isinstance(content, dict) else ():
        counted = isinstance(value, int) and re.search("layers|experts", str(key))
        if counted and value > MOST_LAYERS:
            raise ValueError(f"its config says {key}={value}; at most {MOST_LAYERS} are believed.")
        _check_size(value)


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
