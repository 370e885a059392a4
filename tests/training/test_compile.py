"""torch.compile takes a whole model in one graph, in both directions, and training under it routes by current weights."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from peft_arrow import ArrowLoraConfig, ArrowLoraModel
from tests.pico import pico_base
from tests.training.helpers import factors, logits, prototype_error, relative_difference, token_batch


# torch 2.13's own tracing makes instances of classes that it deprecates; nothing in a model changes that.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")


@pytest.fixture(autouse=True)
def no_old_graphs():
    """Graphs of other tests count against the recompilation limit."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def routed(folders, **options):
    return get_peft_model(pico_base(), ArrowLoraConfig(adapters=folders, **{"top_k": 2, **options}))


def compiled(model):
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("kernel", ["auto", "eager", "folded"])
@pytest.mark.parametrize("subset", [None, ["dates"]], ids=["one bank", "two banks"])
def test_forward_and_backward_equal_eager(kernel, subset, adapter_folders):
    gradients = []
    for wrap in (lambda model: model, compiled):
        model = routed(adapter_folders, trainable_experts=subset)
        model.base_model.set_kernel(kernel)
        model.base_model.build_prototypes()
        loss = wrap(model)(**token_batch()).loss
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert found and any(gradient.abs().max() > 0 for gradient in found.values())
        gradients.append((loss.detach(), found))
    (loss, expected), (compiled_loss, found) = gradients
    assert compiled_loss.item() == pytest.approx(loss.item(), abs=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-6, name


def test_inference_equals_eager(adapter_folders):
    model = ArrowLoraModel.from_pretrained(pico_base(), adapter_folders, top_k=2)
    expected = logits(model)
    fast = compiled(model)
    with torch.no_grad():
        answer = fast(input_ids=token_batch(2, 5)["input_ids"]).logits
    assert relative_difference(answer, expected) < 1e-6
    assert relative_difference(logits(pico_base()), expected) > 1e-3


def test_a_cold_model_names_build_prototypes(adapter_folders):
    model = ArrowLoraModel.from_pretrained(pico_base(), adapter_folders, top_k=2)
    with pytest.raises(Exception, match="build_prototypes"):
        compiled(model)(**token_batch())
    torch._dynamo.reset()
    model.base_model.build_prototypes()
    with torch.no_grad():
        compiled(model)(**token_batch())


def losses_of(model, forward, make_optimizer, steps: int = 4) -> list[float]:
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    losses = []
    for _ in range(steps):
        loss = forward(**token_batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
@pytest.mark.parametrize("subset", [None, ["dates"]], ids=["one bank", "two banks"])
def test_training_uses_the_prototypes_of_each_step(fused, subset, adapter_folders):
    def make_optimizer(parameters):
        return torch.optim.AdamW(parameters, lr=0.1, fused=fused)

    curves, models = {}, {}
    for way in ("eager", "compiled", "frozen"):
        options = {"prototype_update": "frozen"} if way == "frozen" else {}
        models[way] = model = routed(adapter_folders, top_k=1, trainable_experts=subset, **options)
        model.base_model.build_prototypes()
        forward = compiled(model) if way == "compiled" else model
        curves[way] = losses_of(model, forward, make_optimizer)
    assert curves["compiled"] == pytest.approx(curves["eager"], abs=1e-5)
    assert max(abs(a - b) for a, b in zip(curves["eager"], curves["frozen"])) > 1e-3, "old prototypes would be seen"
    assert prototype_error(models["compiled"]) < 1e-5
    eager, fast = factors(models["eager"]), factors(models["compiled"])
    assert all((x - y).abs().max() < 1e-4 for key in eager for x, y in zip(eager[key], fast[key]))


def test_one_graph_serves_all_steps(adapter_folders):
    """No step compiles anew: prototypes change in place."""
    from torch._dynamo.testing import CompileCounterWithBackend

    model = routed(adapter_folders, top_k=1)
    model.base_model.build_prototypes()
    counter = CompileCounterWithBackend("aot_eager")
    forward = torch.compile(model, fullgraph=True, backend=counter)
    losses_of(model, forward, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    assert counter.frame_count == 1
