"""Which request a forward belongs to, for choices that are made once a request and then kept.

A request is a batch and what is decoded after it. Its choices are kept on the key-value cache, so that they follow the
cache when it is copied or used later, and end with it.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..routers import Routing


KEPT_ON_CACHE = "_peft_arrow_request"


@dataclass
class Request:
    """What was decided for a batch.

    Args:
        version (`int`): of the settings that the choices were made with.
        mask_BS (`torch.Tensor`, *optional*): bool, the tokens of the first call that decide; None: all.
        prompt_logits (`dict[str, torch.Tensor]`): PEFT adapter -> float32 (B, E), where a prompt-level router decides.
        decided (`dict`): (PEFT adapter, module) -> the choice of each row.
        merged (`dict`): (PEFT adapter, module) -> the chosen experts as one LoRA a row, for decoding.
        is_first (`bool`): whether only the call that decides was made; its backward may run it again.
    """

    version: int
    mask_BS: torch.Tensor | None = None
    prompt_logits: dict[str, torch.Tensor] = field(default_factory=dict)
    decided: dict[tuple[str, str], Routing] = field(default_factory=dict)
    merged: dict[tuple[str, str], Any] = field(default_factory=dict)
    is_first: bool = True


class RequestTracker:
    """Follows the calls of one model; each thread has its own.

    Attributes:
        version (`int`): raised when the routing is set anew; choices of an older one are not kept.
    """

    def __init__(self) -> None:
        self.version = 0
        self.is_watching = False
        self._prompt_logits: Callable | None = None
        self._local = threading.local()
        self._last: Request | None = None

    @property
    def current(self) -> Request | None:
        """The request of this thread's running or last call; in another thread (a backward) that of the last call."""
        return getattr(self._local, "request", None) or self._last

    @property
    def is_bare(self) -> bool:
        """Whether this thread is inside `bare`."""
        return getattr(self._local, "bare", False)

    @contextlib.contextmanager
    def bare(self) -> Iterator[None]:
        """While open, the layers add nothing to the base, and calls begin no request."""
        before = self.is_bare
        self._local.bare = True
        try:
            yield
        finally:
            self._local.bare = before

    @contextlib.contextmanager
    def deciding(self, mask_BS: torch.Tensor) -> Iterator[None]:
        """While open, only these tokens of a batch decide."""
        before = getattr(self._local, "mask", None)
        self._local.mask = mask_BS
        try:
            yield
        finally:
            self._local.mask = before

    def watch(self, model: nn.Module, prompt_logits: Callable[[dict, torch.Tensor | None], dict]) -> None:
        """Follow the calls of `model`; `prompt_logits(inputs, mask)` gives what prompt-level routers say."""
        if self._prompt_logits is None:
            # hooks stay; they are bound methods, so that a copied model has those of its own tracker
            model.register_forward_pre_hook(self._begin, with_kwargs=True)
            model.register_forward_hook(self._end, with_kwargs=True)
        self._prompt_logits = prompt_logits
        self.is_watching = True

    def unwatch(self) -> None:
        """Stop following, and forget."""
        self.is_watching = False
        self._last = None
        self._local = threading.local()

    def _begin(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.is_bare or not self.is_watching:
            return
        request = _continued(kwargs.get("past_key_values"), self.version)
        if request is None:
            inputs = _inputs(args, kwargs)
            request = Request(self.version, self._mask(inputs, kwargs.get("attention_mask")))
            request.prompt_logits = self._prompt_logits(inputs, request.mask_BS)
        else:
            request.is_first = False
        self._local.request = self._last = request

    def _end(self, _module: nn.Module, _args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        request = getattr(self._local, "request", None)
        if self.is_bare or request is None:
            return
        cache = getattr(output, "past_key_values", None)
        cache = kwargs.get("past_key_values") if cache is None else cache
        if cache is not None and hasattr(cache, "__dict__"):
            setattr(cache, KEPT_ON_CACHE, request)

    def _mask(self, inputs: dict[str, torch.Tensor], attention_mask: Any) -> torch.Tensor | None:
        tensor = next(iter(inputs.values()), None)
        if tensor is None:
            return None
        shape = tensor.shape[:2]
        wanted = getattr(self._local, "mask", None)
        if wanted is not None:
            if wanted.shape != shape or not wanted.any(1).all():
                raise ValueError(
                    f"mask of routing_prompt has shape {tuple(wanted.shape)} for inputs of {tuple(shape)}; it has one "
                    "entry a token, and each row needs at least one that is True."
                )
            return wanted.to(tensor.device).bool()
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            mask = attention_mask[:, -shape[1] :].bool()
            return mask if mask.shape == shape else None
        return None

    def __deepcopy__(self, memo: dict) -> RequestTracker:
        copied = RequestTracker()
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __getstate__(self) -> dict:
        kept = ("version", "is_watching", "_prompt_logits")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict) -> None:
        self.__init__()
        self.__dict__.update(state)


def _inputs(args: tuple, kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tokens of a call, as the base takes them: `input_ids` or `inputs_embeds`."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(kwargs.get(name), torch.Tensor):
            return {name: kwargs[name]}
    if args and isinstance(args[0], torch.Tensor):
        return {"input_ids": args[0]}
    return {}


def _continued(cache: Any, version: int) -> Request | None:
    """The request that a cache belongs to, if it holds tokens and choices of these settings."""
    request = getattr(cache, KEPT_ON_CACHE, None)
    if request is None or request.version != version:
        return None
    return request if cache.get_seq_length() > 0 else None
