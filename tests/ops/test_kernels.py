"""Every kernel gives what `eager` gives, in outputs and in gradients, at odd sizes and in every dtype."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_arrow.ops import KERNELS, ExpertBank, ExpertStack, bank_constants, routed_lora, select_kernel
from peft_arrow.ops.triton_launch import has_triton, is_interpreted


SHAPES = [
    ((4,), ((0,),)),
    ((1, 5, 2), ((0, 1, 2),)),
    ((3, 3, 3, 3), ((1, 3), (0, 2))),
    ((7, 1, 16), ((2,), (0, 1))),
    ((4, 4, 4, 4, 4), ((0, 1, 2, 3, 4),)),
    ((8, 8, 8), ((1,), (0, 2))),
]
SIZES = [(5, 13, 9), (1, 16, 24), (67, 32, 12)]
# Triton's kernels run on CUDA, and elsewhere by its interpreter where that is asked for: see CONTRIBUTING.md.
RUNS_TRITON = has_triton() and (torch.cuda.is_available() or is_interpreted())
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNNABLE = [name for name in KERNELS if name != "triton" or RUNS_TRITON]


def device_of(kernel):
    return TRITON_DEVICE if kernel == "triton" else "cpu"


def make_stack(ranks, banks, in_features, out_features, dtype, training=False, dropouts=None, device="cpu"):
    """Random experts, split into banks by their positions."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for members in banks:
        rank = sum(ranks[e] for e in members)
        lora_A, lora_B = nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features, bias=False)
        for linear in (lora_A, lora_B):
            linear.weight.data = torch.randn(linear.weight.shape, generator=generator).to(device, dtype)
        fields = {
            "experts": tuple(members),
            "ranks": tuple(ranks[e] for e in members),
            "scalings": tuple(0.5 + e for e in members),
        }
        member_dropouts = tuple((dropouts or [0.0] * len(ranks))[e] for e in members)
        constants = bank_constants(**fields, num_experts=len(ranks), device=device)
        made.append(ExpertBank(lora_A, lora_B, **fields, dropouts=member_dropouts, constants=constants))
    return ExpertStack(tuple(made), len(ranks), out_features, training)


def make_routing(tokens, experts, num_chosen):
    """Distinct experts for each token, some of them none (-1) or the null expert (E), and weights."""
    generator = torch.Generator().manual_seed(1)
    index = torch.rand(tokens, experts + 2, generator=generator).topk(min(num_chosen, experts), dim=-1).indices
    index = torch.where(index > experts, -1, index)
    return index, torch.rand(index.shape, generator=generator)


def with_eager(kernel, ranks, banks, size, aggregation, dtype, num_chosen=3):
    """(output, gradients) of a kernel and of `eager` on the same input."""
    (tokens, in_features, out_features), device = size, device_of(kernel)
    for name in (kernel, "eager"):
        stack = make_stack(ranks, banks, in_features, out_features, dtype, device=device)
        x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(2)).to(device, dtype)
        index, weights = (tensor.to(device) for tensor in make_routing(tokens, len(ranks), num_chosen))
        x.requires_grad_(), weights.requires_grad_()
        y = routed_lora(x, stack, index, weights, aggregation=aggregation, kernel=name)
        (y.float() * torch.arange(out_features, device=device)).sum().backward()
        with torch.no_grad():
            onto = torch.ones(tokens, out_features, dtype=dtype, device=device)
            options = {"aggregation": aggregation, "kernel": name, "onto_TO": onto}
            assert routed_lora(x, stack, index, weights, **options) is onto
        factors = [linear.weight.grad for bank in stack.banks for linear in (bank.lora_A, bank.lora_B)]
        yield [y.detach(), onto - 1, x.grad, weights.grad, *factors]


@pytest.mark.parametrize("kernel", [name for name in RUNNABLE if name != "eager"] + ["auto"])
@pytest.mark.parametrize("ranks, banks", SHAPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("aggregation", ["output", "parameter"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 3e-2)])
def test_outputs_and_gradients_equal_eager(kernel, ranks, banks, size, aggregation, dtype, tolerance):
    """Relative to the largest entry."""
    if aggregation == "parameter" and len(set(ranks)) > 1:
        pytest.skip("parameter aggregation needs one rank")
    found, expected = with_eager(kernel, ranks, banks, size, aggregation, dtype)
    for ours, eager in zip(found, expected, strict=True):
        assert ours.dtype == eager.dtype
        allowed = max(tolerance, 1e-5 if ours.dtype == torch.float32 else 0.0)  # routing weights are always float32
        assert float((ours - eager).abs().max()) <= allowed * float(eager.abs().max() + 1e-30)


@pytest.mark.parametrize("kernel", RUNNABLE)
@pytest.mark.parametrize("has_gradients", [True, False])
def test_no_tokens_and_no_weight(kernel, has_gradients):
    """An empty batch gives an empty result; a token without experts gives 0."""
    with torch.set_grad_enabled(has_gradients):
        check_nothing(kernel)


def check_nothing(kernel):
    device = device_of(kernel)
    stack = make_stack((2, 3), ((0, 1),), 6, 4, torch.float32, device=device)
    nobody, x, weights = (
        torch.full((3, 2), -1, device=device),
        torch.randn(3, 6).to(device),
        torch.rand(3, 2).to(device),
    )
    empty = routed_lora(x[:0], stack, nobody[:0], weights[:0], aggregation="output", kernel=kernel)
    assert empty.shape == (0, 4)
    nothing = routed_lora(x, stack, nobody, weights, aggregation="output", kernel=kernel)
    assert float(nothing.detach().abs().max()) == 0.0


@pytest.mark.parametrize("kernel", RUNNABLE)
def test_dropout_is_each_experts_own(kernel):
    """In training an expert without dropout is untouched, one with dropout 0.9 is not; in eval nobody is."""
    x, weights = torch.ones(200, 6, device=device_of(kernel)), torch.ones(200, 1, device=device_of(kernel))
    only_first, only_second = weights.long() * 0, weights.long()
    for training in (True, False):
        stack = make_stack((2, 3), ((0, 1),), 6, 4, torch.float32, training, [0.0, 0.9], device_of(kernel))
        first = routed_lora(x, stack, only_first, weights, aggregation="output", kernel=kernel)
        second = routed_lora(x, stack, only_second, weights, aggregation="output", kernel=kernel)
        assert float(first.detach().var(dim=0).max()) < 1e-10
        assert (float(second.detach().var(dim=0).max()) > 1e-2) == training


def test_folded_makes_no_tensor_of_experts_times_outputs():
    """The largest tensor of a forward has tokens x max(sum of ranks, in, out, experts) entries."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                Largest.entries = max(Largest.entries, out.numel())
            return out

    ranks = (2,) * 20
    stack = make_stack(ranks, (tuple(range(20)),), 16, 512, torch.float32)
    with torch.no_grad(), Largest():
        routed_lora(torch.randn(256, 16), stack, *make_routing(256, 20, 4), aggregation="output", kernel="folded")
    assert Largest.entries == 256 * 512


@pytest.mark.parametrize("kernel", ["gather", "grouped"])
def test_work_follows_the_chosen_and_not_the_library(kernel):
    """Four experts a token cost four times one, and the same among 12 and among 40."""
    from torch.utils.flop_counter import FlopCounterMode

    flops = {}
    for experts, num_chosen in ((12, 1), (12, 4), (40, 4)):
        stack = make_stack((3,) * experts, (tuple(range(experts)),), 16, 12, torch.float32)
        index = torch.rand(30, experts).topk(num_chosen, dim=-1).indices
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            routed_lora(
                torch.randn(30, 16), stack, index, torch.rand(index.shape), aggregation="output", kernel=kernel
            )
        flops[experts, num_chosen] = counter.get_total_flops()
    assert flops[12, 1] == 30 * 2 * 3 * (16 + 12)
    assert flops[40, 4] == flops[12, 4] == 4 * flops[12, 1]


@pytest.mark.parametrize("kernel", ["gather", "grouped", "sparse"])
@pytest.mark.parametrize("ranks", [(3,) * 9, (1, 5, 2, 3, 3, 4, 2, 1, 6)])
@torch.no_grad()
def test_experts_that_nobody_chose_are_not_read(kernel, ranks):
    """Their factors are NaN, which would show."""
    stack = make_stack(ranks, (tuple(range(9)),), 16, 12, torch.float32)
    index, weights = torch.tensor([[0, 3], [3, 4], [4, 0], [0, 4]]), torch.rand(4, 2)
    x = torch.randn(4, 16)
    expected = routed_lora(x, stack, index, weights, aggregation="output", kernel="eager")
    for bank in stack.banks:
        start = 0
        for expert, rank in zip(bank.experts, bank.ranks, strict=True):
            if expert not in (0, 3, 4):
                bank.lora_A.weight[start : start + rank] = float("nan")
                bank.lora_B.weight[:, start : start + rank] = float("nan")
            start += rank
    found = routed_lora(x, stack, index, weights, aggregation="output", kernel=kernel)
    assert torch.allclose(found, expected, atol=1e-5)


@torch.no_grad()
def test_auto_takes_sparse_on_a_cpu_and_only_there():
    """For many experts whose B lies by expert, at inference; elsewhere what works there."""
    stack = make_stack((8,) * 40, (tuple(range(40)),), 16, 12, torch.float32)
    x = torch.randn(30, 16)
    assert select_kernel("auto", x, stack, 2) == "grouped"
    for linear in (stack.banks[0].lora_B,):
        linear.weight.data = linear.weight.data.t().contiguous().t()
    assert select_kernel("auto", x, stack, 2) == "sparse"
    assert select_kernel("auto", x.bfloat16(), stack, 2) == "grouped"
    assert select_kernel("auto", x.to("meta"), stack, 2) == "grouped"
    with torch.enable_grad():
        assert select_kernel("auto", x, stack, 2) == "grouped"


@torch.no_grad()
def test_sparse_keeps_nothing_of_a_default_device():
    """What it keeps between calls is for the CPU, whatever the default device is at the first call."""
    stack = make_stack((8,) * 40, (tuple(range(40)),), 16, 12, torch.float32)
    x, index, weights = torch.randn(31, 16), torch.rand(31, 40).topk(3, dim=-1).indices, torch.rand(31, 3)
    with torch.device("meta"):
        first = routed_lora(x, stack, index, weights, aggregation="output", kernel="sparse")
    expected = routed_lora(x, stack, index, weights, aggregation="output", kernel="eager")
    assert torch.allclose(first, expected, atol=1e-4)
    assert torch.equal(first, routed_lora(x, stack, index, weights, aggregation="output", kernel="sparse"))
