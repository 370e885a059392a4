"""Routers that learn from data, each against a slow transcription that uses plain PEFT and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import PeftModel
from sklearn.linear_model import LogisticRegression

from peft_arrow import ArrowLoraModel
from tests.pico import pico_base
from tests.reference import read_experts
from tests.routers import formulas


def texts_of(rows, tokenizer):
    """(ids, number of prompt tokens) of each row, the end token added."""
    found = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        found.append((prompt + answer + [tokenizer.eos_token_id], len(prompt)))
    return found


@pytest.mark.parametrize("pool", ["mean", "last"])
@pytest.mark.parametrize("score", ["cosine", "dot"])
def test_centroids(model, mixed, rows, ids, compare, tokenizer, pool, score):
    """The mean input of each module over expert i's rows, one row at a time through plain PEFT with adapter i."""
    experts, centroids = read_experts(list(mixed.values())), {}
    for position, (name, folder) in enumerate(mixed.items()):
        plain, inputs = PeftModel.from_pretrained(pico_base(), folder).eval(), {}
        for module_name, module in plain.get_base_model().named_modules():
            if module_name in experts and position in experts[module_name]:
                kept = inputs.setdefault(module_name, [])
                module.register_forward_pre_hook(lambda m, args, kept=kept: kept.append(args[0][0].double().numpy()))
        for text, _ in texts_of(rows[name], tokenizer):
            with torch.no_grad():
                plain(torch.tensor([text]))
        for module_name, seen in inputs.items():
            tokens = np.concatenate([one if pool == "mean" else one[-1:] for one in seen])
            centroids.setdefault(module_name, {})[position] = tokens.mean(0)
    model.fit_router("centroid", rows, tokenizer=tokenizer, pool=pool, batch_size=3)
    model.set_router(score=score, router_temperature=0.05)

    def weigh(module, row, token, x, mine):
        found = formulas.cosine(x, centroids[module])
        if score == "dot":
            found = {p: value * np.linalg.norm(x) / len(x) ** 0.5 for p, value in found.items()}
        return formulas.choose(found, 2, 0.05)

    # the last token of every row is the end token, so the first layer sees one and the same input for all experts
    assert compare(model, ids, weigh, most_tied=0.02 if pool == "mean" else 0.3) < 1e-4


def test_gates_of_phatgoose(mixed, rows, ids, tokenizer):
    """Every gate is trained alone with plain PEFT: base + sigmoid(g . x) delta, whole data in every step."""
    name, folder = "roman", mixed["roman"]
    model = ArrowLoraModel.from_pretrained(pico_base(), mixed)
    model.fit_router("phatgoose", rows, tokenizer=tokenizer, steps=5, batch_size=4, learning_rate=0.05)
    plain = PeftModel.from_pretrained(pico_base(), folder).eval()
    gates = {}
    for module_name, module in plain.get_base_model().named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            gates[module_name] = gate = torch.zeros(module.in_features, requires_grad=True)

            def gated(m, args, output, gate=gate):
                plain_output = m.base_layer(args[0])
                return plain_output + torch.sigmoid(args[0] @ gate)[..., None] * (output - plain_output)

            module.register_forward_hook(gated)
    optimizer = torch.optim.AdamW(list(gates.values()), weight_decay=0.0)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 0.05 * ([0.0] + [1 - i / 4 for i in range(4)])[step]
        nats = []
        for text, prompt in texts_of(rows[name], tokenizer):
            logits = plain(torch.tensor([text])).logits[0].log_softmax(-1)
            nats += [-logits[place - 1, text[place]] for place in range(prompt, len(text))]
        optimizer.zero_grad()
        torch.stack(nats).mean().backward()
        optimizer.step()
    position = list(mixed).index(name)
    for module_name, gate in gates.items():
        layer = model.base_model.routed_layers()[module_name]
        row = layer.experts["default"].positions.index(position)
        stored = layer.stored_rows("phatgoose")["default"].weight[row].numpy()
        np.testing.assert_allclose(stored, formulas.layer_norm(gate.detach().double().numpy()), atol=2e-3)
    layer = model.base_model.routed_layers()["model.layers.0.self_attn.q_proj"]
    x = torch.randn(4, 32)
    gates_E = layer.stored_rows("phatgoose")["default"].weight.double().numpy()
    expected = [[formulas.layer_norm(v) @ g / 32**0.5 for g in gates_E] for v in x.double().numpy()]
    np.testing.assert_allclose(layer.raw_logits("default", x).numpy(), expected, atol=1e-4)


def test_fitting_changes_nothing_else(mixed, rows, ids, tokenizer):
    """Weights, gradients, modes and the logits of the router that was set before."""
    model = ArrowLoraModel.from_pretrained(pico_base(), mixed, is_trainable=True).train()
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    for name in ("centroid", "task_predictor", "retrieval", "phatgoose"):
        model.fit_router(name, rows, tokenizer=tokenizer, **({"steps": 2} if name == "phatgoose" else {}))
    after = dict(model.named_parameters())
    for name, (trained, value) in before.items():
        assert after[name].requires_grad == trained and after[name].grad is None
        assert torch.equal(after[name].nan_to_num(7.0), value.nan_to_num(7.0)) or "router" in name
    new = set(after) - set(before)
    assert new and not any(after[name].requires_grad for name in new)
    assert all(module.training for module in model.modules())


def prompt_features(prompts, tokenizer):
    """Mean of the base's last hidden states over each prompt, one at a time."""
    base, found = pico_base(), []
    for prompt in prompts:
        with torch.no_grad():
            out = base(torch.tensor([tokenizer(prompt)["input_ids"]]), output_hidden_states=True)
        found.append(out.hidden_states[-1][0].double().mean(0).numpy())
    return np.stack(found)


def prompt_weights(model, prompts, tokenizer):
    """Weights of the experts for each prompt, (B, E), as q_proj of the last layer got them; padded to one length."""
    encoded = tokenizer(prompts, padding=True, return_tensors="pt")
    with model.trace_routing() as trace, torch.no_grad():
        model(encoded["input_ids"], attention_mask=encoded["attention_mask"])
    module = trace["model.layers.1.self_attn.q_proj"]
    weights = torch.zeros(len(prompts), len(model.expert_names))
    return weights.scatter_add(1, module.top_k_index[:, 0].clamp_min(0), module.top_k_weights[:, 0]).numpy()


def softmax(scores):
    """Over the last axis."""
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def test_task_predictor_is_logistic_regression(model, rows, tokenizer):
    """scikit-learn's classifier on features that were computed prompt by prompt."""
    model.fit_router("task_predictor", rows, tokenizer=tokenizer, weight_decay=0.05)
    prompts = [row["prompt"] for some in rows.values() for row in some]
    owners = [place for place, some in enumerate(rows.values()) for _ in some]
    features = prompt_features(prompts, tokenizer)
    mean, spread = features.mean(0), features.std(0)
    fitted = LogisticRegression(C=1 / (0.05 * len(prompts)), tol=1e-8, max_iter=5000)
    fitted.fit((features - mean) / spread, owners)
    asked = ["sql number 9:", "what is the plural of dates?", "roman"]
    expected = fitted.predict_proba((prompt_features(asked, tokenizer) - mean) / spread)
    model.set_router("task_predictor", top_k=5)
    np.testing.assert_allclose(prompt_weights(model, asked, tokenizer), expected, atol=1e-3)
    assert model.active_peft_config.fitted["task_predictor"]["train_accuracy"] == 1.0


@pytest.mark.parametrize("score", ["nearest", "mean"])
def test_retrieval_is_the_cosine_with_the_examples(model, rows, tokenizer, score):
    """The largest, or the mean, of the cosines with an expert's prompts, all of them centred first."""
    model.fit_router("retrieval", rows, tokenizer=tokenizer, max_rows=3)
    prompts = [row["prompt"] for some in rows.values() for row in some[:3]]
    features = prompt_features(prompts, tokenizer)
    center = features.mean(0)
    examples = (features - center) / np.linalg.norm(features - center, axis=1, keepdims=True)
    asked = ["euro number 7:", "date"]
    found = prompt_features(asked, tokenizer) - center
    cosines = (found / np.linalg.norm(found, axis=1, keepdims=True)) @ examples.T
    grouped = cosines.reshape(len(asked), 5, 3)
    expected = softmax((grouped.max(-1) if score == "nearest" else grouped.mean(-1)) / 0.1)
    model.set_router("retrieval", score=score, top_k=5, router_temperature=0.1)
    np.testing.assert_allclose(prompt_weights(model, asked, tokenizer), expected, atol=1e-4)


def test_prompt_routers_decide_by_the_prompt_alone(model, rows, tokenizer, ids):
    """While decoding, and with a mask of the prompt, what follows does not matter."""
    model.fit_router("task_predictor", rows, tokenizer=tokenizer)
    model.set_router(top_k=1)
    prompt = torch.zeros_like(ids, dtype=torch.bool)
    prompt[:, :5] = True
    with torch.no_grad(), model.trace_routing() as trace:
        with model.routing_prompt(prompt):
            model(ids)
        model(ids[:, :5])
        model.generate(input_ids=ids[:, :5], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    chosen = [step["model.layers.0.self_attn.q_proj"].top_k_index[:, 0] for step in (s.modules for s in trace.steps)]
    assert len(chosen) == 5 and all(torch.equal(one, chosen[0]) for one in chosen)


@pytest.mark.parametrize(
    ("form", "columns"),
    [
        (
            lambda r: {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": "x"}]},
            None,
        ),
        (lambda r: {"instruction": r["prompt"], "input": "in", "output": r["completion"]}, None),
        (lambda r: {"text": r["prompt"]}, None),
        (
            lambda r: {
                "prompt": [{"role": "user", "content": "a"}],
                "completion": [{"role": "assistant", "content": "b"}],
            },
            None,
        ),
    ],
)
def test_forms_of_rows(model, rows, tokenizer, form, columns):
    """What TRL takes as a row is taken here."""
    model.fit_router(
        "centroid", {name: [form(row) for row in some] for name, some in rows.items()}, tokenizer=tokenizer
    )
    assert model.active_peft_config.router == "centroid"


def test_datasets_are_taken(model, rows, tokenizer):
    """A `datasets.Dataset` as well as a list."""
    from datasets import Dataset

    model.fit_router("retrieval", {name: Dataset.from_list(some) for name, some in rows.items()}, tokenizer=tokenizer)
    assert model.active_peft_config.fitted["retrieval"]["rows"] == dict.fromkeys(rows, 4)
