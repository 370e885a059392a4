"""A.10 to A.12, A.15 and A.16: what can be seen of the routing, what it costs, and what the errors and docs say."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode

import peft_arrow
from peft_arrow import ROUTERS, ArrowLoraConfig, ArrowLoraModel
from peft_arrow.tuner import prototypes

from .adapters import adapter, difference, expert_files, logits, routed, top_right_direction
from .bases import WIDTH, llama, token_ids


LAYER = "model.layers.0.self_attn.q_proj"


def test_trace_says_who_got_which_token(trio):
    """Against |x . v| from the files, for every token of one layer."""
    model, seen = routed(trio, top_k=2), []
    model.base_model.routed_layers()[LAYER].register_forward_hook(lambda layer, args, y: seen.append(args[0]))
    with model.trace_routing() as trace:
        logits(model)
    rows = []
    for folder in trio.values():
        tensors = expert_files(folder)[1]
        rows.append(top_right_direction(tensors[f"{LAYER}.lora_A"], tensors[f"{LAYER}.lora_B"]))
    scores = (seen[0].double() @ torch.stack(rows).T).abs()
    top, index = scores.topk(2, dim=-1)
    assert torch.equal(trace[LAYER].top_k_index, index)
    assert difference(trace[LAYER].top_k_weights, torch.softmax(top, dim=-1)) < 1e-5
    assert all(name in trace.table() for name in ("one", "two", "three"))


def test_repr_names_the_layer(trio):
    assert "arrow_lora.ArrowLoraLinear" in repr(routed(trio))


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation makes, and what is stacked."""

    def __init__(self):
        super().__init__()
        self.numel, self.stacked = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
            if func._schema.name in ("aten::cat", "aten::stack"):
                self.stacked.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("top_k", [1, 20])
def test_no_tensor_of_tokens_experts_and_outputs(tmp_path, top_k):
    """20 experts of rank 2: nothing larger than the base's own output, and no weight is copied to be used."""
    folders = [adapter(tmp_path / str(seed), seed=seed, r=1, target_modules=["up_proj"]) for seed in range(1, 21)]
    model = routed(folders, top_k=top_k)
    layer = model.base_model.routed_layers()["model.layers.0.mlp.up_proj"]
    x = torch.randn(128, WIDTH)
    with torch.no_grad():
        layer(x)
        with Largest() as seen:
            y = layer(x)
    assert seen.numel == y.numel() and not seen.stacked


def test_only_experts_and_prototypes_are_added(trio):
    base, model = llama(), routed(trio)
    added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in base.parameters())
    factors = sum(tensor.numel() for folder in trio.values() for tensor in expert_files(folder)[1].values())
    assert added == factors + 3 * 4 * WIDTH


def test_number_of_modules_does_not_grow(tmp_path, trio):
    more = {f"e{i}": folder for i, folder in enumerate([*trio.values()] * 5)}
    assert len(list(routed(more).modules())) == len(list(routed(trio).modules()))


def count_calls(work) -> int:
    """Python functions entered while `work` runs."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def test_loading_is_linear_in_the_number_of_adapters(trio):
    """PEFT's work per adapter triples from 5 to 50 adapters; here forty cost at most four times what ten cost."""
    folders = list(trio.values())

    def load(count):
        base = llama()
        return count_calls(
            lambda: ArrowLoraModel.from_pretrained(base, {f"e{i}": folders[i % 3] for i in range(count)})
        )

    load(2)
    assert load(40) < 4.2 * load(10)


def test_adding_an_expert_builds_its_prototypes_only(trio, monkeypatch):
    model = routed([trio["one"], trio["two"]], top_k=2)
    logits(model)
    built = []

    def spy(lora_A, lora_B, original=prototypes.top_right_singular_vectors):
        built.append(len(lora_A))
        return original(lora_A, lora_B)

    monkeypatch.setattr(prototypes, "top_right_singular_vectors", spy)
    model.add_expert(trio["three"])
    logits(model)
    assert built == [1] * 4, "one prototype in each of the four layers"
    model.remove_expert("one")
    logits(model)
    assert built == [1] * 4


def test_temperature_and_top_k_are_saved_settings(trio, tmp_path):
    model = routed(trio, top_k=1, router_temperature=2.0, aggregation="parameter")
    model.save_pretrained(tmp_path)
    config = PeftModel.from_pretrained(llama(), tmp_path).peft_config["default"]
    assert (config.top_k, config.router_temperature, config.aggregation) == (1, 2.0, "parameter")


CRYPTIC = ("NoneType", "KeyError", "non-empty TensorList", "out of range", "int() argument", "scatter()")
WRONG = {
    "no experts": lambda trio: ArrowLoraModel.from_pretrained(llama(), []),
    "top_k": lambda trio: routed(trio, top_k=0),
    "a string": lambda trio: routed(trio["one"]),
    "unknown expert": lambda trio: routed(trio).remove_expert("task_2"),
    "not a library": lambda trio: routed([str(trio["one"]) + "/nothing"]),
    "config without experts": lambda trio: PeftModel(llama(), ArrowLoraConfig(task_type="CAUSAL_LM")),
}


@pytest.mark.parametrize("case", WRONG)
def test_messages_are_about_the_argument(trio, case):
    with pytest.raises(ValueError) as caught:
        WRONG[case](trio)
    assert not any(text in str(caught.value) for text in CRYPTIC) and len(str(caught.value)) > 20


def test_public_functions_are_documented():
    for name in (
        "from_pretrained",
        "add_expert",
        "remove_expert",
        "set_router",
        "refresh_prototypes",
        "trace_routing",
    ):
        assert len(getattr(ArrowLoraModel, name).__doc__) > 40
    ours = ("random", "pinned")  # a control, and the caller's own choice: no paper's rules
    assert all(router.__doc__ for router in ROUTERS.values())
    assert all(ROUTERS[name].paper.startswith("https://") for name in ROUTERS if name not in ours)
    assert peft_arrow.ArrowLoraModel is ArrowLoraModel


def test_a_copy_does_not_follow_its_original(trio):
    """Prototypes of a copy are its own."""
    model = routed(trio, top_k=1)
    before = logits(model)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in clone.named_parameters():
            if "arrow_lora_B" in name:
                parameter.copy_(torch.flip(parameter, (0,)))
    assert difference(logits(clone, input_ids=token_ids()), before) > 1e-3
    assert torch.equal(logits(model), before)
