"""Shares, entropy and agreement, each against a slow loop over the numbers that the trace was made of."""

from __future__ import annotations

import math
import random

import pytest
import torch

from peft_arrow.tuner.trace_stats import (
    kind_of,
    layer_labels,
    layer_of,
    routing_agreement,
    routing_entropy,
    routing_shares,
)
from tests.tuner.traces import inputs, module, step, trace_of, two_rows


NAMES = ["a", "b", "c", "d"]
MODULES = {  # module -> the experts that have it
    "model.layers.0.self_attn.q_proj": [0, 1, 2, 3],
    "model.layers.0.mlp.up_proj": [0, 2],
    "model.layers.1.self_attn.q_proj": [1, 2, 3],
}
OWN = {"nouns": "b", "years": "c"}


def test_names_of_layers_and_kinds():
    assert layer_of("model.layers.12.mlp.up_proj") == "model.layers.12"
    assert layer_of("score") == "score" and kind_of("score") == "score"
    assert kind_of("model.layers.12.mlp.up_proj") == "up_proj"
    assert layer_labels(["model.layers.0", "model.layers.1"]) == ["0", "1"]
    assert layer_labels(["encoder.block.0", "decoder.block.0"]) == ["encoder.block.0", "decoder.block.0"]


def drawn(generator, experts):
    """One token: up to three experts with weights of sum 1, and what is left of the three is nothing."""
    kept = generator.sample(experts, min(len(experts), generator.choice([1, 2, 3])))
    weights = [generator.random() + 0.05 for _ in kept]
    weights = [weight / sum(weights) for weight in weights]
    return kept + [-1] * (3 - len(kept)), weights + [0.0] * (3 - len(kept))


@pytest.fixture(scope="module")
def made():
    """A trace of two calls with padding, one with two decoding steps, and all tokens that count, as a flat list."""
    generator, steps, tokens = random.Random(5), [], []
    calls = [
        ([[1, 1, 1], [0, 0, 1]], ("nouns", "years"), 2),
        ([[0, 1], [1, 1], [1, 1]], ("years", "other", "nouns"), 0),
    ]
    for mask, tasks, decoded in calls:
        before = None
        for number in range(decoded + 1):
            whole = [row + [1] * number for row in mask]
            length = 1 if number else len(mask[0])
            before = inputs([[9] * length for _ in mask], whole, tasks, before)
            modules = {}
            for name, experts in MODULES.items():
                pairs = [[drawn(generator, experts) for _ in range(length)] for _ in mask]
                for row, task in enumerate(tasks):
                    for position in range(length):
                        if number or mask[row][position]:
                            index, weights = pairs[row][position]
                            weights = [float(torch.tensor(weight)) for weight in weights]  # as float32 keeps it
                            tokens.append((task, name, {i: w for i, w in zip(index, weights) if i >= 0}))
                modules[name] = module(
                    [[index for index, _ in row] for row in pairs],
                    [[weights for _, weights in row] for row in pairs],
                    before,
                    tuple(experts),
                )
            steps.append(step(modules))
    return trace_of(*steps, names=NAMES), tokens


GROUP = {
    "all": lambda task, name: "all",
    "task": lambda task, name: task,
    "layer": lambda task, name: name.split(".self")[0].split(".mlp")[0],
    "kind": lambda task, name: name.split(".")[-1],
    "module": lambda task, name: name,
}


def in_groups(tokens, by):
    found = {}
    for task, name, weights in tokens:
        found.setdefault(GROUP[by](task, name), []).append((task, name, weights))
    return found


@pytest.mark.parametrize("by", GROUP)
def test_shares(made, by):
    trace, tokens = made
    expected = {}
    for group, members in in_groups(tokens, by).items():
        sums = [sum(weights.get(expert, 0.0) for _, _, weights in members) for expert in range(4)]
        expected[group] = [one / sum(sums) for one in sums]
    got = routing_shares(trace, by)
    assert set(got) == set(expected)
    assert all(got[group] == pytest.approx(expected[group], abs=1e-9) for group in expected)


@pytest.mark.parametrize("by", GROUP)
def test_entropy(made, by):
    trace, tokens = made
    got = routing_entropy(trace, by)
    for group, members in in_groups(tokens, by).items():
        nats = [sum(-w * math.log(w) for w in weights.values()) for _, _, weights in members]
        mean = sum(nats) / len(nats)
        sums = [sum(weights.get(expert, 0.0) for _, _, weights in members) for expert in range(4)]
        shares = [one / sum(sums) for one in sums]
        of_shares = sum(-share * math.log(share) for share in shares if share)
        assert got[group].nats == pytest.approx(mean, abs=1e-6)
        assert got[group].of_shares == pytest.approx(of_shares, abs=1e-9)
        assert got[group].experts == pytest.approx(math.exp(mean), abs=1e-6)
        assert got[group].experts_in_use == pytest.approx(math.exp(of_shares), abs=1e-6)


@pytest.mark.parametrize("by", GROUP)
def test_agreement(made, by):
    trace, tokens = made
    got = routing_agreement(trace, OWN, by)
    expected = {}
    for group, members in in_groups(tokens, by).items():
        counted = []
        for task, name, weights in members:
            own = NAMES.index(OWN[task]) if task in OWN else None
            if own in MODULES[name]:
                is_top = max(weights, key=weights.get) == own
                counted.append((is_top, weights.get(own, 0.0), 1 / len(MODULES[name])))
        if counted:
            expected[group] = ([sum(column) / len(counted) for column in zip(*counted)], len(counted))
    assert set(got) == set(expected) and expected
    for group, ((top, weight, chance), count) in expected.items():
        found = got[group]
        assert (found.top, found.weight, found.chance) == pytest.approx((top, weight, chance), abs=1e-7)
        assert found.tokens == count


def test_ties_are_shared():
    """Equal weights for all experts agree as often as chance, whichever comes first."""
    equal = module([[[0, 1, 2, 3]]], [[[0.25] * 4]], inputs([[5]], tasks=("a",)), (0, 1, 2, 3))
    trace = trace_of(step({"model.layers.0.q_proj": equal}), names=NAMES)
    for own in NAMES:
        found = routing_agreement(trace, {"a": own})["all"]
        assert (found.top, found.weight, found.chance, found.tokens) == (0.25, 0.25, 0.25, 1)
    assert routing_entropy(trace)["model.layers.0"].experts == pytest.approx(4)


def test_the_default_own_expert_has_the_name_of_the_task():
    assert routing_agreement(two_rows(("b", "other")))["all"].tokens == 2
    assert routing_agreement(two_rows()) == {}
    with pytest.raises(ValueError, match=r"own_experts\['b'\]='z' is no expert; experts are \['a'"):
        routing_agreement(two_rows(("b", "other")), {"b": "z"})
    with pytest.raises(ValueError, match="by='color' is unknown; allowed are 'all', 'task'"):
        routing_shares(two_rows(), "color")


def test_tokens_without_any_expert():
    """A token for which nothing was kept has no entropy and agrees with nobody."""
    nothing = module([[[-1], [1]]], [[[0.0], [1.0]]], inputs([[5, 6]], tasks=("b",)))
    trace = trace_of(step({"model.layers.0.q": nothing}))
    assert routing_shares(trace, "all")["all"] == [0, 1, 0]
    assert routing_entropy(trace, "all")["all"].nats == 0
    assert routing_agreement(trace)["all"].top == 0.5
    none = trace_of(step({"q": module([[[-1]]], [[[0.0]]])}))
    assert routing_shares(none, "all")["all"] == [0, 0, 0] and math.isnan(routing_entropy(none, "all")["all"].nats)


def test_a_module_of_another_shape_has_no_mask():
    decoder = module([[[0], [1], [1]]], [[[1.0], [1.0], [1.0]]])
    assert routing_shares(trace_of(step({"decoder.block.0.q": decoder})))["decoder.block.0"] == pytest.approx(
        [1 / 3, 2 / 3, 0]
    )


def test_flat_tokens_are_cut_into_rows():
    """(B * S, K), as a mixture-of-experts block has it: the mask of (B, S) and the tasks still count."""
    given = inputs([[0, 5], [6, 7]], [[0, 1], [1, 1]], ("nouns", "years"))
    flat = module([[0], [1], [2], [2]], [[1.0], [1.0], [1.0], [1.0]], given)
    trace = trace_of(step({"model.layers.0.q": flat}))
    assert routing_shares(trace, "task") == {"nouns": [0, 1, 0], "years": [0, 0, 1]}


def test_tasks_of_repeated_rows():
    """Beams and several answers of a prompt are rows beside each other."""
    given = inputs([[5], [5], [6], [6]], tasks=("nouns", "years"))
    trace = trace_of(step({"q": module([[[0]], [[0]], [[1]], [[2]]], [[[1.0]]] * 4, given)}))
    assert routing_shares(trace, "task") == {"nouns": [1, 0, 0], "years": [0, 0.5, 0.5]}


def test_rows_that_have_ended_do_not_count():
    given = inputs([[2], [6]], [[1, 1], [1, 1]], ended=[True, False])
    trace = trace_of(step({"q": module([[[0]], [[1]]], [[[1.0]], [[1.0]]], given)}))
    assert routing_shares(trace, "all")["all"] == [0, 1, 0]
