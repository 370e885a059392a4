"""The short way through inference gives what the general way gives, and is taken when it should be."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_arrow import ArrowLoraConfig, ArrowLoraModel
from peft_arrow.tuner import shared_input
from tests.pico import pico_adapter, pico_base


IDS = torch.arange(3, 51).view(2, 24) % 60
# Experts, rank and top_k: all experts at once; chosen ones.
FEW, MANY = {"num_experts": 6, "r": 4, "top_k": 2}, {"num_experts": 40, "r": 4, "top_k": 3}
ROUTED = "base_model.model.model.layers.0.self_attn"


def make(seed: int = 3, **options) -> PeftModel:
    """A routed model with random experts, in eval mode and frozen."""
    torch.manual_seed(seed)
    config = ArrowLoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_weights=False, **options)
    model = get_peft_model(pico_base(), config).eval()
    return model.requires_grad_(False)


@pytest.fixture
def taken(monkeypatch) -> list:
    """The places in their groups of the modules that went the short way."""
    places, add = [], shared_input.SharedInput.add

    def watched(self, layer, x, result):
        answer = add(self, layer, x, result)
        if answer is not None:
            places.append(self.places[id(layer)])
        return answer

    monkeypatch.setattr(shared_input.SharedInput, "add", watched)
    return places


@pytest.mark.parametrize("size", [FEW, MANY])
@pytest.mark.parametrize("ids", [IDS, IDS[:1, :1]], ids=["many tokens", "one token"])
@pytest.mark.parametrize("settings", [{}, {"router_temperature": 0.3}, {"top_k": 1}, {"top_k": 99}])
@torch.no_grad()
def test_same_logits_as_the_general_way(size, ids, settings, taken):
    model = make(**size)
    model.set_router("arrow", **settings)
    short = model(input_ids=ids).logits
    assert len(taken) == 14 and set(taken) == {0, 1, 2}, "all modules, q k v and gate up together"
    model.set_kernel("eager")
    general = model(input_ids=ids).logits
    assert len(taken) == 14
    assert float((short - general).abs().max()) <= 1e-5 * float(general.abs().max())


@pytest.mark.parametrize("size", [FEW, MANY])
@torch.no_grad()
def test_calibrated(size, taken):
    """Layer by layer: through layers this model makes 1e-3 of the 1e-7 between any two kernels."""
    model = make(**size)
    model.calibrate_router(sequences=8, length=24)
    layers = model.base_model.routed_layers().values()
    inputs = [torch.randn(2, 9, layer.in_features) for layer in layers]
    taken.clear()
    short = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    assert len(taken) == len(layers)
    model.set_kernel("eager")
    for layer, x, ours in zip(layers, inputs, short, strict=True):
        assert float((layer(x) - ours).abs().max()) <= 1e-5 * float(ours.abs().max())


@torch.no_grad()
def test_many_experts_are_scored_in_two_stages(taken, monkeypatch):
    """With the same result; the policy asks for more tokens and wider modules than a pico base has."""
    calls, two_stages = [], shared_input.top_k_in_two_stages
    monkeypatch.setattr(shared_input, "scores_in_two_stages", lambda *_: True)
    monkeypatch.setattr(
        shared_input, "top_k_in_two_stages", lambda *args: calls.append(two_stages(*args)) or calls[-1]
    )
    model = make(num_experts=560, r=2, top_k=3)
    short = model(input_ids=IDS).logits
    assert len(taken) == 14 and len(calls) == 8 and all(call.full_share < 0.5 for call in calls)
    layer = model.get_submodule(f"{ROUTED}.k_proj")
    layer.arrow_lora_A["default"].weight.mul_(1.5).add_(0.01)  # prototypes, and what is made of them, follow
    changed = model(input_ids=IDS).logits
    model.set_kernel("eager")
    general = model(input_ids=IDS).logits
    assert not torch.equal(short, changed)
    assert float((changed - general).abs().max()) <= 1e-4 * float(general.abs().max())


@pytest.mark.parametrize("top_k", [1, 5])
@torch.no_grad()
def test_modules_of_one_group_with_other_ranks(taken, tmp_path, top_k):
    """One product and one choice serve modules of one rank; others go by the tables of each."""
    lora = {"r": 4, "rank_pattern": {"v_proj": 20}, "alpha_pattern": {"up_proj": 3}, "target_modules": "all-linear"}
    folders = [pico_adapter(tmp_path / str(seed), seed=seed, **lora) for seed in range(5)]
    model = ArrowLoraModel.from_pretrained(pico_base(), folders, top_k=top_k)
    for ids in (IDS, IDS[:1, :1]):
        taken.clear()
        model.set_kernel("auto")
        short = model(input_ids=ids).logits
        assert len(taken) == 14
        model.set_kernel("eager")
        general = model(input_ids=ids).logits
        assert float((short - general).abs().max()) <= 1e-5 * float(general.abs().max())


@torch.no_grad()
def test_decoding_with_a_cache(taken):
    model = make(**MANY)
    short = model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False)
    assert taken
    model.set_kernel("eager")
    assert torch.equal(short, model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize(
    "options", [{"tied": True}, {"top_p": 0.5}, {"null_expert": 0.0}, {"masked_experts": ["expert-0"]}]
)
@torch.no_grad()
def test_other_selections_go_the_general_way(options, taken):
    model = make(**FEW)
    if "masked_experts" in options:
        options = {"masked_experts": model.expert_names[:1]}
    model.set_router("arrow", **options)
    model(input_ids=IDS)
    assert not taken


def test_gradients_go_the_general_way(taken):
    model = make(**FEW)
    embeddings = model.get_input_embeddings()(IDS).requires_grad_()
    model(inputs_embeds=embeddings).logits.sum().backward()
    assert not taken and embeddings.grad is not None
    model.train()
    model(input_ids=IDS)
    assert not taken


@torch.no_grad()
def test_the_trace_is_that_of_the_general_way():
    model = make(**MANY)
    with model.trace_routing() as short:
        model(input_ids=IDS)
    model.set_kernel("eager")
    with model.trace_routing() as general:
        model(input_ids=IDS)
    for module in general:
        assert torch.equal(short[module].top_k_index, general[module].top_k_index)
        assert torch.allclose(short[module].top_k_weights, general[module].top_k_weights, atol=1e-6)


@pytest.mark.parametrize("part", ["arrow_lora_A", "arrow_lora_B", "arrow_lora_router"])
@torch.no_grad()
def test_changed_weights_are_seen(part):
    """Of a module in the middle of a group, whose choice the first module of the group makes."""
    model = make(**FEW)
    before = model(input_ids=IDS).logits
    layer = model.get_submodule(f"{ROUTED}.k_proj")
    weight = getattr(layer, part)["default"].weight
    weight.copy_(weight.flip(0 if part != "arrow_lora_B" else 1) * 3.0)
    short = model(input_ids=IDS).logits
    model.set_kernel("eager")
    general = model(input_ids=IDS).logits
    assert not torch.equal(before, short)
    assert float((short - general).abs().max()) <= 1e-5 * float(general.abs().max())


@torch.no_grad()
def test_an_input_changed_in_place_is_scored_again():
    model = make(**FEW)
    attention = model.get_submodule(ROUTED)
    x = torch.randn(1, 5, 32)
    attention.q_proj(x)
    x.mul_(-2.0).add_(1.0)
    expected = attention.k_proj(x.clone())
    attention.q_proj(x.clone())
    assert torch.equal(attention.k_proj(x), expected)
    attention.v_proj(x)
    assert not model.base_model._modules["model"].model.layers[0].self_attn.q_proj.shared["default"]._choices


@torch.no_grad()
def test_a_hook_on_the_base_layer_keeps_what_it_saw():
    """The base's output is changed in place only where nobody else holds it."""
    model = make(**FEW)
    base_layer = model.get_submodule(f"{ROUTED}.q_proj").base_layer
    seen = []
    handle = base_layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    model(input_ids=IDS)
    handle.remove()
    assert torch.equal(seen[0][1], base_layer(seen[0][0]))


@torch.no_grad()
def test_threads_do_not_mix():
    model = make(**FEW)
    inputs = [torch.randint(0, 60, (1, 7 + n), generator=torch.Generator().manual_seed(n)) for n in range(6)]
    expected = [model(input_ids=ids).logits for ids in inputs]
    found = [None] * len(inputs)

    def run(place: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                found[place] = model(input_ids=inputs[place]).logits

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, alone in zip(found, expected, strict=True):
        assert torch.equal(ours, alone)


@pytest.mark.parametrize("size", [FEW, MANY])
def test_inference_mode_first_and_training_after(size, taken):
    """What is made under inference mode can be used outside it, and the weights can still train."""
    model = make(**size)
    with torch.inference_mode():
        first = model(input_ids=IDS).logits.clone()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, first)
    assert taken
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("arrow_lora_A" in name or "arrow_lora_B" in name)
    taken.clear()
    logits = model(input_ids=IDS).logits
    logits.sum().backward()
    assert not taken and float((logits.detach() - first).abs().max()) <= 1e-5 * float(first.abs().max())


def test_steps_of_a_fused_optimizer_are_seen(taken):
    """They raise no version counter; the model is evaluated between them without gradients."""
    model = make(**FEW)
    factors = [p.requires_grad_() for name, p in model.named_parameters() if "arrow_lora_A" in name]
    optimizer = torch.optim.AdamW(factors, lr=0.1, fused=True)
    for _ in range(2):
        model.set_kernel("auto")
        with torch.no_grad():
            model(input_ids=IDS)
        model(input_ids=IDS).logits.square().sum().backward()
        optimizer.step()
        taken.clear()
        with torch.no_grad():
            short = model(input_ids=IDS).logits
            assert taken
            model.set_kernel("eager")
            general = model(input_ids=IDS).logits
        assert float((short - general).abs().max()) <= 1e-5 * float(general.abs().max())


@torch.no_grad()
def test_copies_have_their_own_groups():
    model = make(**FEW)
    model(input_ids=IDS)
    copied = copy.deepcopy(model)
    layers = {id(module) for module in copied.modules()}
    shared = copied.get_submodule(f"{ROUTED}.q_proj").shared["default"]
    assert len(shared.members) == 3 and all(id(member) in layers for member in shared.members)
    assert torch.equal(copied(input_ids=IDS).logits, model(input_ids=IDS).logits)


@torch.no_grad()
def test_frozen_factors_lie_by_expert_and_are_saved_as_before(tmp_path):
    model = make(**MANY)
    weight = model.get_submodule(f"{ROUTED}.q_proj").arrow_lora_B["default"].weight
    values = weight.clone()
    logits = model(input_ids=IDS).logits
    assert weight.t().is_contiguous() and torch.equal(weight, values)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(pico_base(), tmp_path).eval()
    assert torch.equal(again(input_ids=IDS).logits, logits)
