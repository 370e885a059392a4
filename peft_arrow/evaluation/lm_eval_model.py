"""lm-evaluation-harness on a routed model: `--model peft-arrow`."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import fields
from importlib.util import find_spec
from os import PathLike, fspath
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from tqdm import tqdm

from ..routers import ROUTERS
from ..tuner import ArrowLoraConfig, ArrowLoraModel
from ..tuner.routing import decides_once


if find_spec("lm_eval") is None:
    raise ImportError('the lm-eval plug-in needs lm_eval: pip install "peft-arrow[lm-eval]"')

from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402


# What decides how a library is routed; every other argument is the harness's.
ROUTING = [field.name for field in fields(ArrowLoraConfig) if field.name not in {f.name for f in fields(PeftConfig)}]
Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("peft-arrow")
class PeftArrowLM(HFLM):
    """A base with a library of adapters, routed, as a model of lm-evaluation-harness.

    Where a router decides once a prompt, it sees the context of a request only: an option that is scored has no say in
    who scores it. Requests are then put together by the number of tokens in their context, so batches are smaller.
    In `loglikelihood_rolling` the context of a window is one token.

    Args:
        base (`str`, `PathLike` or `PeftModel`):
            Hub id or folder of the base; or a routed model, which comes with `tokenizer`.
        library: reference to a library or an adapter (from Python and JSON also a list or dict of references).
        routed_model (`str`, *optional*): folder or Hub id of a saved routed model, in the place of `library`: with it
            comes a router that was fitted to data.
        device (`str`, *optional*): default `"cuda"` where there is one, else `"cpu"`.
        options: any field of [`ArrowLoraConfig`], such as `router` and `top_k`; the router's own options, such as
            `seed` of `random`; and any argument of the harness's own model `hf`, such as `dtype`, `batch_size`,
            `max_length`, `revision` (of the base), `tokenizer`.

    Raises:
        ValueError: both or none of `library` and `routed_model`, or anything that routing the library refuses.
    """

    def __init__(
        self,
        base: str | PathLike | PeftModel,
        library: Any = None,
        routed_model: str | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        base = fspath(base) if isinstance(base, PathLike) else base
        sources = [source for source in (library, routed_model) if source is not None]
        if len(sources) != isinstance(base, str):
            raise ValueError(
                f"library={library!r}, routed_model={routed_model!r} is not allowed; with a base given by name it is "
                "one of the two, with a routed model as base none."
            )
        self._library, self._routed_model = library, routed_model
        self._routing = {name: options.pop(name) for name in ROUTING if name in options}
        router = ROUTERS.get(self._routing.get("router", "arrow"))
        own = {name: options.pop(name) for name in (router.options if router else ()) if name in options}
        if own:
            self._routing["router_options"] = own
        if self._routing and library is None:
            raise ValueError(f"{next(iter(self._routing))} goes with library; a routed model brings its settings.")
        self._context_tokens: int | None = None
        super().__init__(pretrained=base, device=device or ("cuda" if torch.cuda.is_available() else "cpu"), **options)

    def _create_model(self, pretrained: str, *args: Any, **kwargs: Any) -> None:
        """Load the base as the harness does, and route it."""
        super()._create_model(pretrained, *args, **kwargs)
        if self._routed_model is not None:
            self._model = PeftModel.from_pretrained(self._model, self._routed_model)
        else:
            adapters = self._library if isinstance(self._library, (list, dict)) else [self._library]
            self._model = ArrowLoraModel.from_pretrained(self._model, adapters, **self._routing)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score (texts, context, continuation) requests; one call of the harness's own method a length of context."""
        if self.backend != "causal" or not decides_on_prompts(self.model):
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        places: dict[int, list[int]] = {}
        for place, (_, context, continuation) in enumerate(requests):
            cut = max(len(context) + len(continuation) - (self.max_length + 1), 0)
            places.setdefault(len(context) - cut, []).append(place)
        if self.batch_size == "auto" and override_bs is None:
            override_bs = self._detect_batch_size([max(requests, key=lambda one: len(one[1]) + len(one[2]))])
        answers: list[Any] = [None] * len(requests)
        hidden = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=hidden) as bar:
            for tokens, group in sorted(places.items(), reverse=True):
                with self._deciding_on(tokens):
                    found = super()._loglikelihood_tokens([requests[place] for place in group], True, override_bs)
                for place, answer in zip(group, found, strict=True):
                    answers[place] = answer
                bar.update(len(group))
        return answers

    @contextmanager
    def _deciding_on(self, tokens: int):
        """Let the first tokens of each row alone decide."""
        self._context_tokens = tokens
        try:
            yield
        finally:
            self._context_tokens = None

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The harness's forward pass of rows (B, S), padded on the right."""
        prompt = nullcontext()
        if self._context_tokens is not None:
            mask = torch.arange(inps.shape[1], device=inps.device) < self._context_tokens
            prompt = self.model.routing_prompt(mask.expand(inps.shape))
        with prompt:
            return super()._model_call(inps, *args, **kwargs)


def decides_on_prompts(model: torch.nn.Module) -> bool:
    """Whether the model is routed by a choice that is made once a request, and not for each token."""
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, ArrowLoraModel):
        return False
    return decides_once(model.active_peft_config.make_router())
