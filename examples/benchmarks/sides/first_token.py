"""From loaded adapters to the first generated token, for ours and for PEFT's Arrow."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.config import ArrowConfig

from .ours import prototypes, routed_layers
from .peft_side import ROUTER
from .targets import verdicts


def route_loaded(model: PeftModel, top_k: int) -> PeftModel:
    """Route a model between all adapters that PEFT has loaded into it, as `create_arrow_model` does after its loop.

    Args:
        model (`PeftModel`): with the adapters; it is changed.
        top_k (`int`): experts a token, at most as many as there are: PEFT's router fails with more.
    """
    names = list(model.peft_config)
    config = ArrowConfig(top_k=min(top_k, len(names)), rng_seed=0)
    config.task_adapter_names, config.gks_adapter_names = names, []
    shape = model.peft_config[names[0]]
    router = LoraConfig(arrow_config=config, target_modules=shape.target_modules, r=shape.r)
    model.add_adapter(ROUTER, router)
    model.set_adapter(ROUTER)
    return model.eval()


@torch.no_grad()
def first_token(model: PeftModel, ids: torch.Tensor) -> int:
    """The token that greedy generation puts first; prototypes that are not built yet are built here."""
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    return int(model.generate(input_ids=ids, **options)[0, -1])


@torch.no_grad()
def check_routed(ours: PeftModel, peft: PeftModel, ids: torch.Tensor, without: torch.Tensor) -> float:
    """Compare the logits of ours and of PEFT's Arrow with our prototypes, which are put into it.

    Args:
        ours (`PeftModel`): a routed model of the adapters.
        peft (`PeftModel`): of `route_loaded`, of the same adapters.
        ids (`torch.Tensor`): int64 (batch, tokens).
        without (`torch.Tensor`): the base's logits.

    Returns:
        The largest difference, relative to the largest change that routing makes.

    Raises:
        AssertionError: they differ by more than a thousandth.
    """
    expected = ours(ids).logits
    for name, layer in routed_layers(ours).items():
        arrow = peft.get_base_model().get_submodule(name).lora_arrow[ROUTER]
        arrow.register_buffer("prototypes", prototypes(layer).clone(), persistent=False)
        arrow._protos_ready = True
    difference = float((peft(ids).logits - expected).abs().max() / (expected - without).abs().max())
    assert difference < 1e-3, f"the routed models differ by {difference:.1e} of what routing changes"
    return difference


def told_first_token(count: int, seconds: dict[str, float], is_issue_setting: bool) -> str:
    """A line: seconds by method, and PEFT's over ours, beside the target where it is stated for this setting."""
    ours, peft = "peft-arrow", "PEFT"
    line = f"{count} adapters, load to first token: "
    line += ", ".join(f"{method} {value:.2f} s" for method, value in seconds.items())
    if not {ours, peft} <= set(seconds):
        return line
    ratio = seconds[peft] / seconds[ours]
    wanted = verdicts("load to first token", count, lambda side, other: ratio) if is_issue_setting else []
    return "; ".join([line, *(wanted or [f"{peft} / {ours}: {ratio:.1f}"])])
