"""A.6: every input shape, precision, offload, sharding and graph tool that a plain LoRA works with."""

from __future__ import annotations

import threading

import accelerate
import pytest
import torch
from peft import get_peft_model

from peft_arrow import ArrowLoraConfig, ArrowLoraModel

from .adapters import TOLERANCE, VISIBLE, assert_layers_match, difference, logits, plain, routed
from .bases import WIDTH, inputs_of, llama, token_ids


LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def model(trio):
    return routed(list(trio.values()), top_k=2)


@pytest.fixture
def layer(model):
    return model.base_model.routed_layers()[LAYER]


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(trio, base_dtype, dtype):
    """As close to the plain adapter under autocast as without: with one expert they do the same arithmetic."""
    ours = routed([trio["one"]], lambda: llama().to(base_dtype), top_k=1)
    theirs = plain(trio["one"], lambda: llama().to(base_dtype))
    with torch.autocast("cpu", dtype):
        found, expected, base = logits(ours), logits(theirs), logits(llama().to(base_dtype))
    assert difference(expected, base) > VISIBLE
    assert difference(found, expected) <= 0.02 * expected.abs().max().item()


def test_autocast_training(trio):
    """What Trainer(bf16=True) does: forward under autocast, backward, a step."""
    trained = get_peft_model(llama(), ArrowLoraConfig(adapters=trio, top_k=2))
    before = logits(trained)
    optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=1.0)
    ids = token_ids()
    with torch.autocast("cpu", torch.bfloat16):
        loss = trained(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    assert difference(logits(trained), before) > VISIBLE


def test_non_contiguous_inputs(layer):
    x = torch.randn(3, 5, WIDTH)
    with torch.no_grad():
        expected = layer(x)
        assert difference(layer(x.transpose(0, 1)), expected.transpose(0, 1)) <= TOLERANCE
        assert difference(layer(x[:, :-1]), expected[:, :-1]) <= TOLERANCE
        channels_first = x.transpose(1, 2).contiguous()
        assert difference(layer(channels_first.transpose(1, 2)), expected) <= TOLERANCE
        assert difference(layer(x[:1].expand(4, 5, WIDTH)), expected[:1].expand(4, -1, -1)) <= TOLERANCE


def test_any_number_of_dimensions(layer):
    x = torch.randn(3, 5, WIDTH)
    with torch.no_grad():
        expected = layer(x)
        assert difference(layer(x[0, 0]), expected[0, 0]) <= TOLERANCE
        assert difference(layer(x[0]), expected[0]) <= TOLERANCE
        assert difference(layer(x[:, None]), expected[:, None]) <= TOLERANCE
        assert layer(x[:0]).shape == (0, 5, WIDTH) and layer(x[:, :0]).shape == (3, 0, WIDTH)
        assert difference(layer.double()(x.double()), expected) <= TOLERANCE


def test_nan_rows_stay_where_they_are(layer):
    x = torch.randn(3, 5, WIDTH)
    with torch.no_grad():
        expected = layer(x)
        x[1] = float("nan")
        found = layer(x)
    assert torch.equal(found[[0, 2]], expected[[0, 2]]) and found[1].isnan().all()


def test_inference_mode_first_training_later(trio):
    model = get_peft_model(llama(), ArrowLoraConfig(adapters=trio, top_k=2))
    ids = token_ids()
    with torch.inference_mode():
        model(input_ids=ids)
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients and all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("used_before", [False, True])
def test_offload(tmp_path, trio, model, where, used_before):
    """Whether or not the prototypes were built before the weights left."""
    expected = logits(routed(list(trio.values()), top_k=2))
    if used_before:
        logits(model)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert difference(logits(model), expected) <= TOLERANCE


def test_cold_compile_says_what_to_do(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"call model.build_prototypes\(\) first"):
        logits(compiled)


@pytest.mark.filterwarnings("default")  # torch's own, of its compiler
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_warm_compile_is_one_graph(model, backend):
    expected = logits(model)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    assert difference(logits(torch.compile(model, fullgraph=True, backend=backend)), expected) <= TOLERANCE
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.filterwarnings("default")
def test_warm_compile_with_inductor(layer):
    """One layer: generating code for all of them would take most of a minute."""
    x = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        expected = layer(x)
        torch._dynamo.reset()
        assert difference(torch.compile(layer, fullgraph=True, backend="inductor")(x), expected) <= TOLERANCE


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("strict", [False, True])
def test_warm_export(trio, strict):
    """Also with a dynamic sequence length, used on lengths that were not traced."""
    model = routed(list(trio.values()), lambda: llama(use_cache=False), top_k=2)
    model.build_prototypes()
    shapes = {"input_ids": {1: torch.export.Dim("length", min=2, max=32)}}
    inputs = {"input_ids": token_ids()}
    program = torch.export.export(model.get_base_model(), (), inputs, dynamic_shapes=shapes, strict=strict)
    for length in (9, 5):
        ids = token_ids(length=length, seed=length)
        with torch.no_grad():
            assert difference(program.module()(input_ids=ids).logits, model(ids).logits) <= TOLERANCE


@pytest.mark.filterwarnings("default")
def test_cold_export_leaves_the_model_usable(model):
    with pytest.raises(Exception, match=r"call model.build_prototypes\(\) first"):
        torch.export.export(model.get_base_model(), (), {"input_ids": token_ids()})
    assert all(
        type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in model.state_dict(keep_vars=True).values()
    )
    assert torch.isfinite(logits(model)).all()


@pytest.mark.filterwarnings("default")
def test_jit_trace(layer):
    x = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        layer(x)
        traced = torch.jit.trace(layer, (x,))
        assert difference(traced(x), layer(x)) <= TOLERANCE


def test_vmap_cold(layer):
    """PEFT's random start refuses vmap; there is no random number here."""
    x = torch.randn(4, 5, WIDTH)
    with torch.no_grad():
        found = torch.vmap(layer)(x)
        assert difference(found, layer(x)) <= TOLERANCE


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(trio, reentrant):
    """Gradients equal those without it, also when the checkpointed forward is the first."""
    ids = token_ids()
    gradients = []
    for checkpointing in (False, True):
        model = get_peft_model(llama(), ArrowLoraConfig(adapters=trio, top_k=2)).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(g is not None and g.abs().sum() > 0 for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert difference(gradients[1][name], gradient) <= TOLERANCE


def test_first_request_from_eight_threads(trio):
    """All threads meet an unbuilt model at once and get the answer that a single one gets."""
    expected = logits(routed(list(trio.values()), top_k=2))
    model, barrier, answers = routed(list(trio.values()), top_k=2), threading.Barrier(8), [None] * 8

    def request(i):
        barrier.wait()
        answers[i] = logits(model)

    threads = [threading.Thread(target=request, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(difference(answer, expected) == 0 for answer in answers)


def test_replicas_of_data_parallel(trio):
    """What DataParallel does per forward: shallow replicas; they route as the model does and leave it as it is."""
    model = routed(list(trio.values()), top_k=2)
    expected = logits(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer = model.base_model.routed_layers()[LAYER]
    x = torch.randn(4, WIDTH)
    with torch.no_grad():
        wanted = layer(x)
        for _ in range(3):
            replica = layer._replicate_for_data_parallel()
            # by the general way, which rounds in another order than the short one
            assert difference(replica(x), wanted) <= 1e-5
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), expected)


def test_half_precision_base_routes_in_float32(trio):
    model = routed(list(trio.values()), lambda: llama().to(torch.bfloat16), top_k=2)
    assert_layers_match_loosely(model, list(trio.values()))
    for layer in model.base_model.routed_layers().values():
        assert layer.arrow_lora_router["default"].weight.dtype == torch.float32
        x = torch.randn(3, WIDTH, dtype=torch.bfloat16)
        assert layer.route("default", x).top_k_weights.dtype == torch.float32


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_dtype_of_experts_on_a_half_precision_base(trio, autocast_adapter_dtype):
    """float32 by default, as PEFT has it; the base's dtype where asked for."""
    base, options = llama().to(torch.bfloat16), {"autocast_adapter_dtype": autocast_adapter_dtype}
    for model in (
        get_peft_model(llama().to(torch.bfloat16), ArrowLoraConfig(adapters=trio), **options),
        ArrowLoraModel.from_pretrained(base, trio, **options),
    ):
        found = {p.dtype for name, p in model.named_parameters() if "arrow_lora_A" in name or "arrow_lora_B" in name}
        assert found == {torch.float32 if autocast_adapter_dtype else torch.bfloat16}
        assert torch.isfinite(logits(model)).all()


def assert_layers_match_loosely(model, folders):
    """The bf16 model against the fp32 one: near, and not the base."""
    exact, base = logits(routed(folders, top_k=2)), logits(llama())
    found = logits(model).float()
    assert (found - exact).abs().mean() < 0.2 * (exact - base).abs().mean()


def test_float64_model(trio):
    folders = list(trio.values())
    model = routed(folders, top_k=2).double()
    assert_layers_match(model, folders, top_k=2)
    assert logits(model, **inputs_of(llama)).dtype == torch.float64
