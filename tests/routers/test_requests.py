"""One choice a request: made from the prompt, kept while decoding, and worth one merged LoRA."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

from peft_arrow import ArrowLoraModel
from tests.pico import pico_base
from tests.reference import read_experts
from tests.routers import formulas
from tests.routers.test_formulas import SCORES


@pytest.fixture
def sequence(model):
    """The five experts, one choice a request."""
    model.set_router("arrow", granularity="sequence", top_k=2)
    return model


@pytest.mark.parametrize("router", SCORES)
def test_mean_logits_of_the_row_decide(model, mixed, compare, ids, router):
    """All tokens of a row go where the mean of their logits says; rows do not see each other."""
    experts, score = read_experts(list(mixed.values())), SCORES[router]
    model.set_router(router, granularity="sequence", top_k=2)
    inputs = {}
    for name, layer in model.base_model.routed_layers().items():
        layer.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0].detach()}))
    with torch.no_grad():
        model(ids)

    def weigh(module, row, token, x, mine):
        found = [score(one, experts[module]) for one in inputs[module][row].double().numpy()]
        return formulas.choose({p: np.mean([one[p] for one in found]) for p in mine}, 2)

    assert compare(model, ids, weigh) < 1e-5


def merged_by_hand(trace, mixed, row=0):
    """A plain PEFT LoRA with, per module, the chosen experts of one row side by side; weights and scalings in B."""
    experts = read_experts(list(mixed.values()))
    base, ranks, factors = pico_base(), {}, {}
    for module, routing in trace.steps[0].modules.items():
        index, weights = routing.top_k_index[row, 0].tolist(), routing.top_k_weights[row, 0].tolist()
        chosen = [(experts[module][p], w) for p, w in zip(index, weights, strict=True) if p >= 0]
        factors[module] = (
            np.concatenate([e.A for e, _ in chosen]),
            np.concatenate([w * e.scaling * e.B for e, w in chosen], axis=1),
        )
        ranks[module] = len(factors[module][0])
    config = LoraConfig(target_modules=list(factors), rank_pattern=ranks, alpha_pattern=ranks, task_type="CAUSAL_LM")
    plain = get_peft_model(base, config).eval()
    for module, (A, B) in factors.items():
        layer = base.get_submodule(module)
        layer.lora_A["default"].weight.data = torch.tensor(A, dtype=torch.float32)
        layer.lora_B["default"].weight.data = torch.tensor(B, dtype=torch.float32)
    return plain


def test_decoding_equals_a_single_merged_lora(sequence, mixed, ids):
    """Prefill and each step of decoding: the logits of the one LoRA that the request's choice makes."""
    prompt, answer = ids[:1], torch.randint(4, 100, (1, 6), generator=torch.Generator().manual_seed(9))
    with sequence.trace_routing() as trace, torch.no_grad():
        first = sequence(prompt, use_cache=True)
        steps = [first.logits]
        for token in answer.T:
            out = sequence(token[None], past_key_values=first.past_key_values, use_cache=True)
            steps.append(out.logits)
    plain = merged_by_hand(trace, mixed)
    with torch.no_grad():
        expected = plain(torch.cat([prompt, answer], dim=1)).logits
    got = torch.cat(steps, dim=1)
    assert float((got - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    for step in trace.steps[1:]:
        for name, module in step.modules.items():
            assert torch.equal(module.top_k_index[0, 0], trace.steps[0].modules[name].top_k_index[0, 0])
    with torch.no_grad():
        anew = sequence(torch.cat([prompt, answer], dim=1)).logits
    assert float((anew - expected).abs().max()) > 1e-4, "the longer text decides otherwise, or this test shows nothing"


def test_decoding_applies_only_what_was_chosen(sequence, ids):
    """After the prefill a layer keeps one LoRA a row; the stacks of all experts are not touched."""
    with torch.no_grad():
        out = sequence(ids, use_cache=True)
        layer = sequence.base_model.routed_layers()["model.layers.0.self_attn.q_proj"]
        calls = []
        layer.arrow_lora_A["default"].register_forward_hook(lambda *_: calls.append(1))
        sequence(ids[:, :1], past_key_values=out.past_key_values)
    merged = sequence.base_model._tracker().current.merged["default", "model.layers.0.self_attn.q_proj"]
    assert not calls and merged.lora_A.shape[0] == 2 and merged.lora_A.shape[1] <= 5 + 8


def test_parameter_aggregation_is_merged_too(tmp_path, ids):
    """Sums of the A's and of the B's, cross terms included."""
    from tests.pico import pico_adapter

    folders = [pico_adapter(tmp_path / str(i), seed=i, r=4, target_modules=["q_proj", "v_proj"]) for i in range(4)]
    model = ArrowLoraModel.from_pretrained(
        pico_base(), folders, top_k=3, granularity="sequence", aggregation="parameter"
    )
    with torch.no_grad():
        out = model(ids, use_cache=True)
        decoded = model(ids[:, :1], past_key_values=copy.deepcopy(out.past_key_values)).logits
        model.base_model._tracker().current.merged.clear()
        with torch.enable_grad():  # the path of training, which merges nothing
            plain = model(ids[:, :1], past_key_values=out.past_key_values).logits
    assert float((decoded - plain).abs().max()) < 1e-6


def test_generate_keeps_the_choice_of_the_prompt(sequence, ids):
    """Greedy, beams, several answers, left padding: every step has the first one's choice."""
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = (padded != 0).long()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with sequence.trace_routing() as trace:
        plain = sequence.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    for step in trace.steps[1:]:
        for name, module in step.modules.items():
            assert torch.equal(module.top_k_index[:, 0], trace.steps[0].modules[name].top_k_index[:, 0])
    left = sequence.generate(input_ids=padded, attention_mask=mask, **options)
    assert torch.equal(left[:, 3:], plain)
    alone = [
        sequence.generate(input_ids=row[None], attention_mask=torch.ones_like(row[None]), **options) for row in ids
    ]
    assert torch.equal(torch.cat(alone), plain)
    beams = sequence.generate(input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=3, **options)
    no_cache = sequence.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=3, num_return_sequences=2, **options
    )
    assert torch.equal(no_cache[::2], beams)


def test_the_choice_follows_the_cache(sequence, ids):
    """Two conversations in turn, a copied cache, and another router in between."""
    with torch.no_grad():
        one, two = sequence(ids[:1], use_cache=True), sequence(ids[1:], use_cache=True)
        copied = copy.deepcopy(one.past_key_values)
        expected = sequence(ids[:1, :2], past_key_values=one.past_key_values).logits
        sequence(ids[1:, :2], past_key_values=two.past_key_values)
        assert torch.equal(sequence(ids[:1, :2], past_key_values=copied).logits, expected)
        cache = DynamicCache()
        sequence(ids[:1], past_key_values=cache)
        assert torch.equal(sequence(ids[:1, :2], past_key_values=copy.deepcopy(cache)).logits, expected)
        sequence.set_router(top_k=1)
        changed = sequence(ids[:1, :2], past_key_values=cache).logits
        assert float((changed - expected).abs().max()) > 1e-4


def test_routing_prompt_leaves_out_what_follows(sequence, ids):
    """With the prompt's tokens alone deciding, other completions change nothing of the choice."""
    prompt = torch.zeros_like(ids, dtype=torch.bool)
    prompt[:, :4] = True
    other = ids.clone()
    other[:, 4:] = torch.randint(4, 100, other[:, 4:].shape)
    with torch.no_grad():
        with sequence.routing_prompt(prompt):
            first, second = sequence(ids).logits, sequence(other).logits
        assert torch.equal(first[:, :4], second[:, :4])
        assert not torch.equal(sequence(ids).logits[:, :4], sequence(other).logits[:, :4])
        with pytest.raises(ValueError, match="mask of routing_prompt has shape"), sequence.routing_prompt(prompt[:1]):
            sequence(ids)
        with pytest.raises(ValueError, match="at least one"), sequence.routing_prompt(torch.zeros_like(prompt)):
            sequence(ids)


def test_threads_have_requests_of_their_own(sequence, ids):
    """Eight threads decode different texts on one model; each gets what it gets alone."""
    texts = [torch.randint(4, 100, (1, 9), generator=torch.Generator().manual_seed(i)) for i in range(8)]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}

    def run(text):
        return sequence.generate(input_ids=text, attention_mask=torch.ones_like(text), **options)

    alone, together = [run(text) for text in texts], [None] * 8
    threads = [threading.Thread(target=lambda i=i: together.__setitem__(i, run(texts[i]))) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_training_with_one_choice_a_row(mixed, ids):
    """Gradients with and without checkpointing are the same."""
    grads = []
    for checkpointing in (False, True):
        model = ArrowLoraModel.from_pretrained(
            pico_base(), mixed, granularity="sequence", top_k=2, is_trainable=True
        ).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        model(ids, labels=ids).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 4
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-7), name


def test_a_batch_of_another_size_is_refused(sequence, ids):
    """A cache whose rows were changed by hand no longer fits the choice."""
    with torch.no_grad():
        out = sequence(ids, use_cache=True)
        out.past_key_values.batch_select_indices(torch.tensor([0]))
        with pytest.raises(ValueError, match="1 tokens for a request of 2 rows"):
            sequence(ids[:1, :1], past_key_values=out.past_key_values)


def test_rows_for_other_adapters_are_refused(sequence, ids):
    """adapter_names and one choice a request do not go together; a pinned expert does."""
    with torch.no_grad():
        with pytest.raises(ValueError, match="chooses once a request"):
            sequence(ids, adapter_names=["default", "__base__"])
        sequence(ids, adapter_names=["dates", "__base__"])
