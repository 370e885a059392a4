"""The Triton kernels beyond `test_kernels.py`: each way through them, torch.compile, CUDA targets, the fused routing.

They run natively where there is CUDA, and elsewhere by Triton's interpreter: TRITON_INTERPRET=1, set before the start.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path

import pytest
import torch

from peft_arrow.ops import routed_lora, triton_launch, triton_routing, triton_sorted
from peft_arrow.ops.triton_operators import FUNCTIONS, OPERATORS
from peft_arrow.ops.triton_routing import arrow_top_k
from peft_arrow.routers.selection import Selection, select
from tests.ops.test_kernels import RUNS_TRITON, TRITON_DEVICE, make_routing, make_stack


kernel_file = import_module("peft_arrow.ops.triton")
runs_triton = pytest.mark.skipif(not RUNS_TRITON, reason="needs triton, and CUDA or TRITON_INTERPRET=1")
TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
# name: tokens, ranks, banks, in, out, K. Parts of features, wide and ragged ranks, every size of chunk, K = E.
SIZES = {
    "parts": (2, (4, 4, 4), ((0, 1, 2),), 1100, 70, 2),
    "wide": (7, (4, 100, 17), ((0, 1, 2),), 40, 33, 2),
    "wide banks": (5, (100, 3, 100), ((1,), (0, 2)), 17, 40, 3),
    "rows of 32": (70, (2, 2), ((0, 1),), 20, 24, 1),
    "rows of 64": (150, (5, 5), ((1,), (0,)), 20, 24, 2),
    "all experts": (3, (1,) * 70, (tuple(range(70)),), 9, 11, 70),
}


@contextmanager
def unwritten_is_nan():
    """Tensors made without values hold NaN, so that a result that was not written is not 0 by luck."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def fenced(tensor):
    """The same numbers between NaN, so that a read past the end is seen."""
    fence = torch.full((4096,), float("nan"), device=tensor.device, dtype=tensor.dtype)
    return torch.cat([fence, tensor.detach().flatten(), fence])[4096:-4096].view(tensor.shape)


def by_expert(lora_B):
    """The same numbers, but those of an expert in one piece, as the tuner lays out frozen factors."""
    return fenced(lora_B.t()).t()


def results(kernel, size, aggregation, dtype, is_trained, layout=fenced):
    """The output, and gradients where it is trained."""
    tokens, ranks, banks, in_features, out_features, num_chosen = size
    stack = make_stack(ranks, banks, in_features, out_features, dtype, device=TRITON_DEVICE)
    x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(2)).to(TRITON_DEVICE, dtype)
    index, weights = (tensor.to(TRITON_DEVICE) for tensor in make_routing(tokens, len(ranks), num_chosen))
    factors = [linear.weight for bank in stack.banks for linear in (bank.lora_A, bank.lora_B)]
    for place, factor in enumerate(factors):
        factor.data = layout(factor) if place % 2 else fenced(factor)
    x, weights = fenced(x), fenced(weights)
    leaves = [tensor.requires_grad_(is_trained) for tensor in (x, weights, *factors)]
    onto = None if is_trained else torch.ones(tokens, out_features, dtype=dtype, device=TRITON_DEVICE)
    poisoned = unwritten_is_nan() if kernel == "triton" else nullcontext()
    with torch.set_grad_enabled(is_trained), poisoned:
        y = routed_lora(x, stack, index, weights, aggregation=aggregation, kernel=kernel, onto_TO=onto)
        if not is_trained:
            assert y is onto
            return [y - 1]
        (y.float() * torch.arange(out_features, device=TRITON_DEVICE)).sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def assert_close(found, expected, tolerance):
    """Relative to the largest entry."""
    for ours, eager in zip(found, expected, strict=True):
        assert ours.dtype == eager.dtype
        allowed = tolerance * float(eager.float().abs().max() + 1e-30)
        assert float((ours.float() - eager.float()).abs().max()) <= allowed


@runs_triton
@pytest.mark.parametrize("way", ["few", "sorted", "trained"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("aggregation", ["output", "parameter"])
@pytest.mark.parametrize("size", SIZES)
def test_every_way_equals_eager(way, dtype, aggregation, size, monkeypatch):
    size = SIZES[size]
    if aggregation == "parameter" and len(set(size[1])) > 1:
        pytest.skip("parameter aggregation needs one rank")
    monkeypatch.setattr(kernel_file, "FEW_ASSIGNMENTS", 10**6 if way == "few" else 0)
    expected = results("eager", size, aggregation, dtype, way == "trained")
    assert_close(results("triton", size, aggregation, dtype, way == "trained"), expected, TOLERANCES[dtype])


@runs_triton
@pytest.mark.parametrize("way", ["few", "sorted", "trained"])
@pytest.mark.parametrize("size", ["parts", "wide banks"])
def test_factors_may_lie_by_expert(way, size, monkeypatch):
    monkeypatch.setattr(kernel_file, "FEW_ASSIGNMENTS", 10**6 if way == "few" else 0)
    call = (SIZES[size], "output", torch.float32, way == "trained")
    assert_close(results("triton", *call, layout=by_expert), results("eager", *call), 1e-5)


@runs_triton
@pytest.mark.parametrize("is_trained", [False, True])
def test_outputs_made_in_parts_are_the_same(is_trained, monkeypatch):
    """And two runs give the same bits."""
    monkeypatch.setattr(kernel_file, "FEW_ASSIGNMENTS", 0)
    size = (9, (3, 3, 3), ((0, 2), (1,)), 30, 200, 2)
    whole = results("triton", size, "output", torch.float32, is_trained)
    monkeypatch.setattr(triton_sorted, "ROW_BYTES", 1)
    for ours, again in zip(whole, results("triton", size, "output", torch.float32, is_trained), strict=True):
        assert torch.equal(ours, again)


@runs_triton
def test_a_token_without_experts_and_a_bank_without_tokens(monkeypatch):
    stack = make_stack((2, 3), ((0,), (1,)), 6, 4, torch.float32, device=TRITON_DEVICE)
    x = torch.randn(3, 6, device=TRITON_DEVICE, requires_grad=True)
    index = torch.tensor([[-1, 2], [-1, -1], [2, 1]], device=TRITON_DEVICE)
    for few in (0, 512):
        monkeypatch.setattr(kernel_file, "FEW_ASSIGNMENTS", few)
        y = routed_lora(x, stack, index, torch.ones(3, 2, device=TRITON_DEVICE), aggregation="output", kernel="triton")
        assert float(y.detach()[:2].abs().max()) == 0.0
    y.sum().backward()
    assert float(stack.banks[0].lora_A.weight.grad.abs().max()) == 0.0
    assert float(stack.banks[1].lora_A.weight.grad.abs().max()) > 0.0
    assert float(x.grad[:2].abs().max()) == 0.0


@runs_triton
@pytest.mark.parametrize("aggregation", ["output", "parameter"])
@pytest.mark.parametrize("few", [0, 512])
def test_compiles_whole_for_any_number_of_tokens(aggregation, few, monkeypatch):
    """No graph break; the numbers are those of a call that is not compiled."""
    monkeypatch.setattr(kernel_file, "FEW_ASSIGNMENTS", few)
    stack = make_stack((4,) * 5, ((1, 3), (0, 2, 4)), 32, 12, torch.float32, device=TRITON_DEVICE)

    def forward(x, index, weights, onto=None):
        return routed_lora(x, stack, index, weights, aggregation=aggregation, kernel="triton", onto_TO=onto)

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for tokens in (3, 5, 7):
        x = torch.randn(tokens, 32, device=TRITON_DEVICE, requires_grad=True)
        index, weights = (tensor.to(TRITON_DEVICE) for tensor in make_routing(tokens, 5, 3))
        onto = torch.zeros(tokens, 12, device=TRITON_DEVICE)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, index, weights, onto), forward(x, index, weights))
        grads = []
        for function in (compiled, forward):
            x.grad = None
            function(x, index, weights).square().sum().backward()
            grads.append(x.grad)
        torch.testing.assert_close(*grads)


@runs_triton
@pytest.mark.parametrize("name", ["shrink_sorted", "expand_sorted"])
def test_operators_are_as_they_say(name):
    """Schema, values without data, and autograd, as torch checks them."""
    stack = make_stack((3, 3, 3), ((0, 1, 2),), 20, 24, torch.float32, device=TRITON_DEVICE)
    index, _ = make_routing(6, 3, 2)
    by_expert = triton_sorted.sort_assignments(stack.banks[0], index.to(TRITON_DEVICE), FUNCTIONS.cut_chunks)
    first = {
        "shrink_sorted": (torch.randn(6, 20, device=TRITON_DEVICE), stack.banks[0].lora_A.weight, 0),
        "expand_sorted": (torch.randn(6, 2, 3, device=TRITON_DEVICE), stack.banks[0].lora_B.weight, 1),
    }[name]
    torch.library.opcheck(getattr(OPERATORS, name), (first[0].requires_grad_(), *first[1:], *by_expert))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("tokens", [1, 300])
def test_is_captured_in_a_cuda_graph(tokens):
    stack = make_stack((8,) * 16, (tuple(range(16)),), 64, 48, torch.bfloat16, device="cuda")
    x = torch.randn(tokens, 64, device="cuda", dtype=torch.bfloat16)
    index, weights = (tensor.cuda() for tensor in make_routing(tokens, 16, 4))

    def forward():
        with torch.no_grad():
            return routed_lora(x, stack, index, weights, aggregation="output", kernel="triton")

    forward()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = forward()
    x.normal_()
    graph.replay()
    assert torch.equal(y, forward())


@pytest.mark.slow
@pytest.mark.skipif(not triton_launch.has_triton(), reason="needs triton")
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_cuda(capability):
    """Every kernel becomes machine code for the target; triton brings the assembler, and no GPU is needed."""
    script = Path(__file__).with_name("compile_triton.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.ops." + script.stem, str(capability)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {line.split()[0] for line in done.stdout.splitlines()} == {
        "_shrink_few",
        "_expand_few",
        "_cut_chunks",
        "_shrink_sorted",
        "_expand_sorted",
        "_combine",
        "_outer_sorted",
        "_score_few",
        "_score_many",
        "_choose_many",
    }


def test_says_what_is_missing(monkeypatch):
    """An explicit choice fails by name where triton is missing or the device is not CUDA."""
    stack = make_stack((2, 3), ((0, 1),), 6, 4, torch.float32)
    x, index, weights = torch.randn(3, 6), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)

    def run():
        return routed_lora(x, stack, index, weights, aggregation="output", kernel="triton")

    for function in (run, lambda: arrow_top_k(x, torch.randn(2, 6), 1, 1.0)):
        monkeypatch.setattr(triton_launch, "has_triton", lambda: False)
        with pytest.raises(ImportError, match="needs the package triton"):
            function()
        monkeypatch.setattr(triton_launch, "has_triton", lambda: True)
        monkeypatch.setattr(triton_launch, "is_interpreted", lambda: False)
        with pytest.raises(ValueError, match="got inputs on 'cpu'; it needs a CUDA device"):
            function()


@runs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "tokens, experts, features, top_k, temperature",
    [(1, 1, 7, 4, 1.0), (5, 3, 33, 2, 0.5), (3, 16, 300, 4, 1.0), (2, 200, 130, 32, 1.0), (130, 40, 33, 4, 0.1)]
    + [(70, 65, 64, 3, 1e-6), (5, 1000, 20, 4, 1.0)],
)
def test_arrow_top_k_equals_torch(dtype, tokens, experts, features, top_k, temperature):
    x = torch.randn(tokens, features, device=TRITON_DEVICE).to(dtype).requires_grad_()
    prototypes = torch.nn.functional.normalize(torch.randn(experts, features, device=TRITON_DEVICE), dim=-1)
    index, weights = arrow_top_k(x, prototypes, top_k, temperature)
    expected = select((x.float() @ prototypes.T).abs(), Selection(top_k=top_k, temperature=temperature))
    assert torch.equal(index, expected.top_k_index)
    torch.testing.assert_close(weights, expected.top_k_weights, atol=1e-5, rtol=1e-4)
    upstream = torch.randn(weights.shape, device=TRITON_DEVICE)
    grads = [torch.autograd.grad((w * upstream).sum(), x)[0] for w in (weights, expected.top_k_weights)]
    assert_close(grads[:1], grads[1:], 1e-4 if dtype == torch.float32 else TOLERANCES[dtype])
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(arrow_top_k(x, prototypes, top_k, temperature), (index, weights)))


@runs_triton
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
def test_arrow_top_k_takes_the_first_of_equals_and_never_an_expert_that_is_not(monkeypatch):
    x, prototypes = torch.ones(2, 4, device=TRITON_DEVICE), torch.ones(5, 4, device=TRITON_DEVICE)
    x[1] = float("nan")
    for few in (0, 4096):
        monkeypatch.setattr(triton_routing, "FEW_SCORES", few)
        index, weights = arrow_top_k(x, prototypes, 3, 1.0)
        assert index[0].tolist() == [0, 1, 2] and torch.allclose(weights[0], torch.full_like(weights[0], 1 / 3))
        assert int(index.max()) < 5 and bool(weights[1].isnan().all())


@runs_triton
def test_arrow_top_k_refuses_what_it_cannot_do():
    x, prototypes = torch.randn(2, 4, device=TRITON_DEVICE), torch.randn(5, 4, device=TRITON_DEVICE)
    with pytest.raises(ValueError, match="top_k=33 is not allowed"):
        arrow_top_k(x, prototypes, 33, 1.0)
    with pytest.raises(ValueError, match="torch.float64"):
        arrow_top_k(x.double(), prototypes, 1, 1.0)
    with pytest.raises(ValueError, match="gives prototypes no gradient"):
        arrow_top_k(x, prototypes.requires_grad_(), 1, 1.0)


@runs_triton
def test_arrow_top_k_compiles_whole():
    prototypes = torch.randn(9, 32, device=TRITON_DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: arrow_top_k(x, prototypes, 3, 1.0), fullgraph=True, backend="aot_eager")
    for tokens in (3, 5):
        x = torch.randn(tokens, 32, device=TRITON_DEVICE, requires_grad=True)
        for ours, expected in zip(compiled(x), arrow_top_k(x, prototypes, 3, 1.0)):
            assert torch.equal(ours, expected)
        grads = [
            torch.autograd.grad(f(x)[1][:, 0].sum(), x)[0]
            for f in (compiled, lambda x: arrow_top_k(x, prototypes, 3, 1.0))
        ]
        assert torch.equal(*grads)
