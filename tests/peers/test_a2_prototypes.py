"""A.2: prototypes are exact, draw no random number and mean the same on every machine."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_arrow import ROUTERS, ArrowLoraConfig, ArrowLoraModel
from peft_arrow.routers import top_right_singular_vectors

from .adapters import (
    TOLERANCE,
    VISIBLE,
    adapter,
    assert_layers_match,
    difference,
    edit_tensors,
    logits,
    routed,
    top_right_direction,
)
from .bases import WIDTH, inputs_of, llama


def gaussian(width: int, rank: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, width, generator=generator), torch.randn(width, rank, generator=generator)


def with_ratio(ratio: float, seed: int, width: int = 256, rank: int = 8):
    """Factors whose product has singular values 1, ratio, ratio^2, ..."""
    A = torch.linalg.qr(gaussian(width, rank, seed)[1])[0]
    B = torch.linalg.qr(gaussian(width, rank, seed + 100)[1])[0]
    values = ratio ** torch.arange(rank, dtype=torch.float64)
    mix = torch.linalg.qr(gaussian(rank, rank, seed + 200)[0].double())[0]
    return (mix @ A.double().T).float(), ((B.double() * values) @ mix.T).float()


def misalignment(prototype: torch.Tensor, expected: torch.Tensor) -> float:
    return 1.0 - abs(float(prototype.double() @ expected.double()))


@pytest.mark.parametrize(("width", "rank"), [(64, 4), (512, 8), (1024, 8), (1024, 64)])
def test_gaussian_updates(width, rank):
    for seed in range(3):
        A, B = gaussian(width, rank, seed)
        assert misalignment(top_right_singular_vectors([A], [B])[0], top_right_direction(A, B)) < 1e-6


@pytest.mark.parametrize("ratio", [0.5, 0.8, 0.9, 0.95, 0.99, 0.999])
def test_close_singular_values(ratio):
    for seed in range(3):
        A, B = with_ratio(ratio, seed)
        found, expected = top_right_singular_vectors([A], [B])[0], top_right_direction(A, B)
        assert misalignment(found, expected) < 1e-6


@pytest.mark.parametrize("std", [1e-4, 1e-5, 1e-12, 1e-30])
def test_small_updates_have_unit_prototypes(std):
    A, B = gaussian(64, 4, 0)
    found = top_right_singular_vectors([A], [B * std])[0]
    assert abs(found.norm().item() - 1.0) < 1e-6
    assert misalignment(found, top_right_direction(A, B)) < 1e-6


def test_experts_with_small_updates_are_chosen(tmp_path, trio):
    """The rule is about direction: shrinking all of an expert's update must not change who is chosen."""
    small = adapter(tmp_path / "small", seed=2, r=4)
    edit_tensors(small, lambda t: [t[k].mul_(1e-6) for k in t if "lora_B" in k])
    choices = []
    for two in (trio["two"], small):
        model = routed({"one": trio["one"], "two": two}, top_k=1)
        with model.trace_routing() as trace:
            logits(model)
        choices.append(trace["model.layers.0.self_attn.q_proj"].top_k_index)
    assert torch.equal(*choices) and (choices[0] == 1).any()


def test_prototype_after_one_tiny_step(trio):
    """One AdamW step at learning rate 1e-6 from B = 0 is enough for a unit prototype."""
    model = get_peft_model(llama(), ArrowLoraConfig(num_experts=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-6)
    ids = inputs_of(llama)["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.build_prototypes()
    for layer in model.base_model.routed_layers().values():
        norms = layer.arrow_lora_router["default"].weight.norm(dim=1)
        assert torch.allclose(norms, torch.ones(2), atol=1e-6)
        A, B = layer.arrow_lora_A["default"].weight, layer.arrow_lora_B["default"].weight
        expected = top_right_direction(A[:8].detach(), B[:, :8].detach())
        assert misalignment(layer.arrow_lora_router["default"].weight[0], expected) < 1e-6


def test_same_files_same_routing_whatever_the_seed(trio):
    """Four builds of the same files under four seeds: the same experts for every token and bit-equal logits."""
    answers, choices = [], []
    for seed in range(4):
        torch.manual_seed(seed)
        model = routed(list(trio.values()), top_k=2)
        with model.trace_routing() as trace:
            answers.append(logits(model))
        choices.append(torch.cat([trace[name].top_k_index.flatten() for name in trace]))
    assert all(torch.equal(answers[0], other) for other in answers[1:])
    assert all(torch.equal(choices[0], other) for other in choices[1:])
    assert len(set(choices[0].tolist())) == 3, "every expert is chosen somewhere"


def test_routing_is_that_of_the_exact_svd(trio):
    folders = list(trio.values())
    assert_layers_match(routed(folders, top_k=1), folders, top_k=1)
    assert_layers_match(routed(folders, top_k=2), folders, top_k=2)


def test_global_random_state_is_untouched(trio):
    model = routed(list(trio.values()), top_k=2)
    before = torch.get_rng_state()
    logits(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_scale_is_documented_and_not_called_cosine(trio):
    """A score is |x . v|, neither side normalised: ten times the input is a ten times larger logit."""
    layer = routed(list(trio.values()), top_k=2).base_model.routed_layers()["model.layers.0.self_attn.q_proj"]
    x = torch.randn(50, WIDTH)
    layer(x)
    v = layer.arrow_lora_router["default"].weight
    for factor in (0.1, 1.0, 10.0):
        expected = torch.softmax((factor * x @ v.T).abs().topk(2, dim=-1).values, dim=-1)
        assert difference(layer.route("default", factor * x).top_k_weights, expected) < TOLERANCE
    documented = ROUTERS["arrow"].__doc__.lower()
    assert "normalised" in documented and "cosine" not in documented


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_built_under_autocast(trio, dtype):
    inside, outside = routed(list(trio.values()), top_k=2), routed(list(trio.values()), top_k=2)
    with torch.autocast("cpu", dtype):
        logits(inside)
    logits(outside)
    for name, layer in inside.base_model.routed_layers().items():
        built = layer.arrow_lora_router["default"].weight
        assert built.dtype == torch.float32
        assert torch.equal(built, outside.base_model.routed_layers()[name].arrow_lora_router["default"].weight)


def test_order_of_the_experts(trio):
    folders = list(trio.values())
    forward, backward = (logits(routed(order, top_k=2)) for order in (folders, folders[::-1]))
    assert difference(forward, backward) <= TOLERANCE
    assert difference(forward, logits(routed(folders[:2], top_k=2))) > VISIBLE


def test_a_linear_layer_alone(tmp_path):
    """Prototypes need nothing of transformers: a bare module is routed too."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()

    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = LoraConfig(target_modules=["0", "2"], init_lora_weights=False)
        get_peft_model(make(), config).save_pretrained(tmp_path / str(seed))
        folders.append(str(tmp_path / str(seed)))
    model = ArrowLoraModel.from_pretrained(make(), folders, top_k=1)
    with torch.no_grad():
        assert difference(model(torch.ones(3, 16)), make()(torch.ones(3, 16))) > VISIBLE
