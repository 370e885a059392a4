"""What the benchmarks share: the sides are what they say, and what disagrees is not timed."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import pytest
import torch
from peft.tuners.lora.arrow import create_arrow_model
from peft.tuners.lora.config import ArrowConfig
from torch import nn

from peft_arrow.ops import KERNELS


sys.path.insert(0, str(Path(__file__).parent.parent / "examples/benchmarks"))

from sides.bases import PICO, base_and_tokenizer, linear_modules, sharing_copy  # noqa: E402
from sides.experts import Experts, expert_bytes, random_experts, trained_experts, write_folders  # noqa: E402
from sides.limit import limit_of  # noqa: E402
from sides.live_bytes import LiveBytes  # noqa: E402
from sides.ours import kernels, prototypes, routed_layers, routed_model  # noqa: E402
from sides.peft_side import ROUTER, peft_arrow_model  # noqa: E402
from sides.rounds import Times, blocks_in_turn, in_turn  # noqa: E402
from sides.side import BASE, MTTL, OURS, PEFT, PLAIN, XLORA, Request, all_sides  # noqa: E402
from sides.targets import verdicts  # noqa: E402
from sides.training import check_gradients, training_sides  # noqa: E402
from sides.verify import DISAGREES, check_logits, check_sides, runnable  # noqa: E402
from sides.works import model_loss, prefill  # noqa: E402


@pytest.fixture(scope="module")
def pico() -> nn.Module:
    """The benchmarks' small base."""
    return base_and_tokenizer(PICO, torch.device("cpu"), torch.float32)[0]


@pytest.fixture
def ids() -> torch.Tensor:
    """A row of nine tokens."""
    return torch.randint(0, 256, (1, 9), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_peft_side_is_create_arrow_model(pico, ids, tmp_path):
    """Putting experts into PEFT's layers gives what PEFT's own loop over folders gives."""
    experts = random_experts(5, 8)
    folders = write_folders(pico, experts, tmp_path, 5)
    ours = routed_model(pico, experts, top_k=3)
    theirs = create_arrow_model(sharing_copy(pico), folders, ArrowConfig(top_k=3, rng_seed=0)).eval()
    for name, layer in routed_layers(ours).items():
        arrow = theirs.get_base_model().get_submodule(name).lora_arrow[ROUTER]
        arrow.register_buffer("prototypes", prototypes(layer).clone(), persistent=False)
        arrow._protos_ready = True
    filled = peft_arrow_model(pico, folders[0], ours, top_k=3)
    assert torch.equal(prefill(filled, ids), prefill(theirs, ids))
    assert float((prefill(filled, ids) - prefill(pico, ids)).abs().max()) > 1e-3


def test_every_side_agrees_and_a_wrong_kernel_is_not_timed(pico, ids, tmp_path, monkeypatch):
    """A kernel that is 1 % off, and one that is not for this machine, are named and left out."""

    def off(*args):
        return 1.01 * KERNELS["folded"](*args)

    def elsewhere(*args):
        raise NotImplementedError("needs another machine")

    monkeypatch.setitem(KERNELS, "off", off)
    monkeypatch.setitem(KERNELS, "elsewhere", elsewhere)
    sides, absent = all_sides(pico, random_experts(6, 8), Request(top_k=4), [9], tmp_path)
    assert {BASE, PLAIN, OURS, PEFT, MTTL, XLORA, "ours eager", "ours off"} <= {side.name for side in sides}
    found = check_sides(sides, lambda model: prefill(model, ids))
    check_logits(sides, lambda model: prefill(model, ids), found)
    kept, missing = runnable(sides, found)
    assert set(missing) == {"ours off", "ours elsewhere"}
    assert DISAGREES in missing["ours off"] and missing["ours elsewhere"].endswith("needs another machine")
    assert all(found[side.name].compared > 50 for side in kept if side.name not in (BASE, XLORA, "ours eager"))


def test_wrong_gradients_are_not_timed(pico, ids, tmp_path, monkeypatch):
    """A kernel with the right outputs and no gradient to the inputs."""

    def forgets(x_TI, *args):
        return KERNELS["folded"](x_TI.detach(), *args)

    monkeypatch.setitem(KERNELS, "forgets", forgets)
    sides, _ = training_sides(pico, random_experts(6, 8), Request(top_k=4), 9, tmp_path)
    missing = runnable(sides, check_gradients(sides, lambda model: model_loss(model, ids)))[1]
    assert set(missing) == {"ours forgets"} and DISAGREES in missing["ours forgets"]


def test_a_peer_that_needs_too_much_is_a_result(pico, tmp_path):
    """It is named with what it needs, and not made."""
    sides, absent = all_sides(pico, random_experts(6, 8), Request(top_k=4, peer_bytes=1), [1, 9], tmp_path)
    assert {PEFT, MTTL} <= set(absent) and "GiB" in absent[PEFT]
    assert PEFT not in [side.name for side in sides]


def test_trained_experts_are_the_adapters_and_noisy_copies(pico, tmp_path):
    """The first are the adapters as they are; a copy differs, less than another adapter does."""
    write_folders(pico, Experts(3, 4, scaling=3.0), tmp_path, 3)
    experts = trained_experts(7, [tmp_path / f"expert-{i}" for i in range(3)], noise=0.1)
    name, linear = next(iter(linear_modules(pico).items()))
    for known, found in zip(Experts(3, 4).factors(name, linear), experts.factors(name, linear), strict=True):
        assert torch.equal(found[:3], known)
        assert 0 < float((found[4] - known[1]).norm()) < 0.2 * float(known[1].norm())
    assert (experts.count, experts.rank, experts.scaling, experts.kind) == (7, 4, 3.0, "trained")


class Allocates(nn.Module):
    """Allocates 4,000 bytes, then 8,000 beside them, then returns 400 that outlive both."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = torch.zeros(1000)
        second = torch.zeros(2000)
        second.add_(1).view(20, 100)
        del first, second
        return x.float() + torch.zeros(100)


def test_live_bytes_are_counted_until_they_are_freed():
    """Views and changes in place are no allocations; what is made elsewhere does not count."""
    layer = Allocates()
    x = torch.zeros(100)
    with torch.no_grad(), LiveBytes([layer]) as counter:
        kept = [layer(x), torch.zeros(10_000)]
        assert counter.peak == 12_000
        kept.append(layer(x))
        assert counter.peak == 12_400
        assert sum(counter.live.values()) == 800
        kept.clear()
        assert not counter.live


def test_limit_counts_by_hand():
    """One module of 10 x 20: 2 K R (I + O) FLOPs a token, the factors of the experts that were chosen."""
    linears = {"m": nn.Linear(10, 20, bias=False)}
    limit = limit_of(linears, {"m": 5}, tokens=7, experts=9, rank=2, top_k=4, peaks=(1000.0, 100.0))
    assert (limit.apply.flops, limit.apply.read) == (7 * 2 * 4 * 2 * 30, 5 * 2 * 30 * 4)
    assert (limit.score.flops, limit.score.read) == (7 * 2 * 9 * 10, 9 * 10 * 4)
    assert (limit.base.flops, limit.lora.flops) == (7 * 2 * 10 * 20, 7 * 2 * 2 * 30)
    assert limit.seconds["base"] == 8.0 and limit.seconds["apply+score"] == (1200 + 360) / 100


def test_expert_bytes_are_the_parameters(pico):
    """The formula of memory.py."""
    ours = routed_model(pico, random_experts(3, 8), top_k=2)
    held = sum(value.nbytes for name, value in ours.named_parameters() if "arrow_lora_" in name)
    scored = sum(4 * linear.in_features for linear in linear_modules(pico).values())
    assert held == 3 * (expert_bytes(pico, 8) + scored)


def test_ratios_are_medians_over_rounds():
    """Sides take turns; a slow one runs once; one without memory is reported."""
    order, seconds = [], {"a": iter([9.0, 1.0, 2.0, 4.0]), "b": iter([9.0, 1.0, 4.0, 2.0]), "slow": iter([99.0])}

    def call(name: str) -> float:
        order.append(name)
        return next(seconds[name])

    def full() -> float:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    calls = {name: lambda name=name: call(name) for name in seconds}
    times = in_turn({**calls, "full": full}, repeats=3, slow=50)
    assert order == ["a", "b", "slow", "a", "b", "a", "b", "a", "b"]
    assert times.ratio("a", "b") == statistics.median([1.0, 0.5, 2.0]) and times.median("a") == 2.0
    assert times.ratio("slow", "a") == 49.5 and times.once == {"slow"}
    assert "out of memory" in times.absent["full"] and times.ratio("full", "a") is None


def test_blocks_take_turns():
    """Decoding is interleaved block by block."""
    order = []

    def start(name: str):
        for _ in range(3):
            order.append(name)
            yield 1.0

    times = blocks_in_turn({"a": lambda: start("a"), "b": lambda: start("b")}, repeats=1, slow=50)
    assert order == ["a", "b"] + ["a", "b"] * 3 and times.seconds == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_verdicts_say_missed():
    """With the bound of the number of experts."""
    times = Times({OURS: [2.0], PLAIN: [1.0]})
    assert verdicts("prefill", 8, times.ratio) == [
        "ours auto / plain LoRA: 2.00, target <= 1.1: MISSED",
        "PEFT Arrow / ours auto: not measured",
    ]
    assert verdicts("prefill", 1000, times.ratio)[0].endswith("target <= 4: met")


def test_triton_needs_a_gpu(monkeypatch):
    """It is named as absent on a CPU."""
    monkeypatch.setitem(KERNELS, "triton", KERNELS["eager"])
    names, absent = kernels(torch.device("cpu"))
    assert "triton" not in names and absent == {"triton": "needs CUDA"} and names[0] == "auto"
