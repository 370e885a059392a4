"""Options that every router has: mask, null expert, top_p, tied modules, calibration."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from peft_arrow import ArrowLoraModel
from tests.pico import pico_base
from tests.reference import read_experts
from tests.routers import formulas
from tests.routers.test_formulas import SCORES, weigh


@pytest.mark.parametrize("router", SCORES)
def test_masked_experts_are_never_chosen(model, compare, ids, router):
    """Their place goes to the next; a module whose experts are all masked is the base's."""
    model.set_router(router, top_k=2, masked_experts=["dates", "euro"])
    assert compare(model, ids, weigh(SCORES[router], masked=(1, 4))) < 1e-5
    with model.trace_routing() as trace, torch.no_grad():
        model(ids)
    down = trace["model.layers.0.mlp.down_proj"]  # only "dates" has it
    assert (down.top_k_index == -1).all() and (down.top_k_weights == 0).all()


def test_null_expert_is_one_more_candidate(model, compare, ids):
    """Between the others it takes weight that then goes nowhere; far above them the model is the base."""
    model.set_router("arrow", top_k=2, null_expert=1.0)
    assert compare(model, ids, weigh(formulas.arrow, null=1.0)) < 1e-5
    model.set_router(null_expert=1e4, router_temperature=0.01)
    with torch.no_grad():
        assert float((model(ids).logits - pico_base()(ids).logits).abs().max()) < 1e-6


@pytest.mark.parametrize("top_p", [0.3, 0.6, 1.0])
def test_top_p_keeps_the_fewest_that_reach_it(model, compare, ids, top_p):
    """At least one, and the kept are scaled to sum 1."""
    model.set_router("arrow", top_k=4, top_p=top_p, router_temperature=0.3)
    assert compare(model, ids, weigh(formulas.arrow, 4, 0.3, top_p=top_p)) < 1e-5


def test_all_options_together(model, compare, ids):
    """Mask first, then the null expert competes, then top_k, the softmax, and top_p."""
    model.set_router("spectr", top_k=3, router_temperature=0.4, masked_experts=["roman"], null_expert=0.5, top_p=0.8)
    expected = weigh(formulas.spectr, 3, 0.4, masked=(3,), null=0.5, top_p=0.8)
    assert compare(model, ids, expected) < 1e-5


@pytest.mark.parametrize("router", SCORES)
def test_tied_modules_decide_by_their_mean_logits(model, mixed, compare, ids, router):
    """q, k and v share an input; an expert's logit is its mean over those of the three that it has."""
    experts = read_experts(list(mixed.values()))
    score = SCORES[router]

    def weigh_tied(module, row, token, x, mine):
        parent, _, leaf = module.rpartition(".")
        family = next((f for f in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")) if leaf in f), (leaf,))
        peers = [f"{parent}.{name}" for name in family if f"{parent}.{name}" in experts]
        found = [score(x, experts[peer]) for peer in peers]
        means = {p: np.mean([one[p] for one in found if p in one]) for p in mine}
        return formulas.choose(means, 2)

    model.set_router(router, tied=True)
    assert compare(model, ids, weigh_tied) < 1e-5
    assert compare(model, ids, weigh(score)) > 1e-4
    model.set_router(tied=False)
    assert compare(model, ids, weigh(score)) < 1e-5


def written_by_base(count, length, seed):
    """Text that the base writes from its first token, sampled."""
    base = pico_base()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return base.generate(
            input_ids=torch.ones(count, 1, dtype=torch.long),
            attention_mask=torch.ones(count, 1, dtype=torch.long),
            do_sample=True,
            top_k=0,
            min_new_tokens=length - 1,
            max_new_tokens=length - 1,
        )


@pytest.mark.parametrize("router", SCORES)
def test_calibrated_logits_are_standardised(model, mixed, compare, ids, router):
    """Mean and spread of each expert and module over the base's own text and its own hidden states."""
    model.set_router(router)
    state = torch.get_rng_state()
    model.calibrate_router(sequences=6, length=10, batch_size=3, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    text = torch.cat([written_by_base(3, 10, 5), written_by_base(3, 10, 8)])
    experts, base, inputs = read_experts(list(mixed.values())), pico_base(), {}
    for name, module in base.named_modules():
        if name in experts:
            module.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0].flatten(0, 1)}))
    with torch.no_grad():
        base(text)
    score, moments = SCORES[router], {}
    for name, x in inputs.items():
        scores = [score(row, experts[name]) for row in x.double().numpy()]
        moments[name] = {p: ([s[p] for s in scores]) for p in experts[name]}

    def weigh_calibrated(module, row, token, x, mine):
        raw = score(x, mine)
        return formulas.choose({p: (raw[p] - np.mean(m)) / np.std(m) for p, m in moments[module].items()}, 2)

    assert compare(model, ids, weigh_calibrated) < 1e-4
    model.set_router(calibrated=False)
    assert compare(model, ids, weigh(score)) < 1e-5


def test_calibration_is_of_one_router_and_its_options(model):
    """Another router, or another of its options, needs its own."""
    model.set_router("spectr")
    model.calibrate_router(sequences=2, length=8)
    model.set_router(top_k=1, router_temperature=0.5, calibrated=True)
    with pytest.raises(ValueError, match="router='norm', but the stored calibration is of 'spectr'"):
        model.set_router("norm")
    with pytest.raises(ValueError, match="router_options="):
        model.set_router(weights="equal")
    model.set_router("norm", calibrated=False)
    model.set_router("spectr", calibrated=True)
    assert model.active_peft_config.calibrated


def test_calibration_corrects_a_loud_expert(mixed):
    """Inputs with a common part, as real models have: the expert that points there wins raw, and not calibrated."""
    base = pico_base()
    base.model.embed_tokens.weight.data += 0.1
    model = ArrowLoraModel.from_pretrained(base, mixed, router="arrow", top_k=1)
    layer = model.base_model.routed_layers()["model.layers.0.self_attn.v_proj"]
    model.build_prototypes()
    loud = layer.experts["default"].positions.index(1)
    layer.arrow_lora_router["default"].weight.data[loud] = torch.full((32,), 32**-0.5)
    text = torch.randint(4, 100, (8, 16), generator=torch.Generator().manual_seed(1))

    def share():
        with model.trace_routing() as trace, torch.no_grad():
            model(text)
        return float((trace["model.layers.0.self_attn.v_proj"].top_k_index == 1).float().mean())

    assert share() == 1.0
    model.calibrate_router(sequences=16, length=16)
    assert 0.05 < share() < 0.6


def test_copies_keep_their_own_requests(model, ids):
    """A copied model follows its own calls."""
    model.set_router("arrow", granularity="sequence")
    copied = copy.deepcopy(model)
    model.set_router(granularity="token")
    with torch.no_grad():
        sequence = copied(ids).logits
        assert float((sequence - model(ids).logits).abs().max()) > 1e-4
        model.set_router(granularity="sequence")
        assert torch.equal(sequence, model(ids).logits)
