"""A.3: experts of different ranks, modules, layers and scalings are routed; each layer's output is the formula's."""

from __future__ import annotations

import pytest
import torch
from peft import LoHaConfig, PeftModel, PromptTuningConfig, get_peft_model

from .adapters import (
    TOLERANCE,
    VISIBLE,
    adapter,
    assert_layers_match,
    assert_one_expert_is_plain,
    difference,
    edit_tensors,
    expert_files,
    logits,
    plain,
    routed,
)
from .bases import clip, inputs_of, llama, t5


LAYER_0 = r".*layers\.0\..*q_proj"
ONE_LAYER = {
    "layers_to_transform": {"layers_to_transform": [1]},
    "regex": {"target_modules": LAYER_0},
    "full path": {"target_modules": ["model.layers.1.self_attn.q_proj"]},
    "exclude_modules": {"exclude_modules": ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]},
}


def biased_llama():
    return llama(attention_bias=True)


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 3},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 40}},
        {"rank_pattern": {"q_proj": 3}},
        {"rank_pattern": {r"layers\.1\..*v_proj": 3}, "alpha_pattern": {"layers.0.self_attn.q_proj": 40}},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "lm_head"]},
        {"layer_replication": [(0, 2), (1, 2)]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        *ONE_LAYER.values(),
    ],
    ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items()),
)
def test_one_expert(tmp_path, options):
    folder = adapter(tmp_path / "one", **options)
    if "init_lora_weights" in options:
        edit_tensors(folder, lambda t: [t[k].add_(torch.randn(t[k].shape) * 0.2) for k in t])
    assert_one_expert_is_plain(folder)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_one_expert_with_biases(tmp_path, bias):
    assert_one_expert_is_plain(adapter(tmp_path / "one", biased_llama, bias=bias), biased_llama)


def test_trained_biases_are_refused_by_name(tmp_path):
    folder = adapter(tmp_path / "one", biased_llama, bias="all")
    edit_tensors(folder, lambda t: [t[k].add_(1.0) for k in t if k.endswith(".bias")])
    with pytest.raises(ValueError, match=r"'one'.*\.bias' with other values than the base model.*trained bias"):
        routed([folder], biased_llama)


def test_trained_head_is_used(tmp_path):
    assert_one_expert_is_plain(adapter(tmp_path / "one", modules_to_save=["lm_head"]))


def test_two_trained_heads_need_a_choice(tmp_path):
    heads = {name: adapter(tmp_path / name, seed=s, modules_to_save=["lm_head"]) for s, name in enumerate("ab", 1)}
    with pytest.raises(ValueError, match=r"'a' and 'b' bring different trained modules.*modules_to_save_from"):
        routed(heads)
    first, second = (logits(routed(heads, modules_to_save_from=name)) for name in "ab")
    assert difference(first, second) > VISIBLE
    with pytest.raises(ValueError, match=r"modules_to_save_from='c' is not an expert"):
        routed(heads, modules_to_save_from="c")


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_mixed_ranks_modules_and_scalings(mixed, top_k):
    """Ranks 4, 8 and 2; attention only, MLP only, all linear modules: each layer routes among those that have it."""
    folders = list(mixed.values())
    assert_layers_match(routed(folders, top_k=top_k), folders, top_k=top_k)


@pytest.mark.parametrize("case", ONE_LAYER)
def test_two_experts_on_the_same_subset(tmp_path, case):
    folders = [adapter(tmp_path / str(s), seed=s, **ONE_LAYER[case]) for s in (1, 2)]
    model = routed(folders, top_k=1)
    assert_layers_match(model, folders, top_k=1)
    routed_names = set(model.base_model.routed_layers())
    assert routed_names == {k.removesuffix(".lora_A") for k in expert_files(folders[0])[1] if k.endswith("lora_A")}


SELECTIONS = {
    "target_modules": ({"target_modules": ["q_proj"]}, lambda name: name.endswith("q_proj")),
    "exclude_modules": ({"exclude_modules": ["q_proj"]}, lambda name: name.endswith("v_proj")),
    "layers_to_transform": ({"layers_to_transform": [1]}, lambda name: ".1." in name),
}


@pytest.mark.parametrize("case", SELECTIONS)
def test_part_of_what_the_experts_have(tmp_path, trio, case):
    """The config can leave modules of its experts out; the saved model leaves them out too."""
    options, is_kept = SELECTIONS[case]
    everywhere = routed(trio, top_k=1)
    model = routed(trio, top_k=1, **options)
    assert set(model.base_model.routed_layers()) == set(filter(is_kept, everywhere.base_model.routed_layers()))
    assert_layers_match(model, list(trio.values()), top_k=1)
    model.save_pretrained(tmp_path / "routed")
    again = PeftModel.from_pretrained(llama(), tmp_path / "routed")
    assert torch.equal(logits(again), logits(model)) and difference(logits(model), logits(everywhere)) > VISIBLE


def test_text_tower_only(tmp_path):
    target = r"text_model.*(q_proj|v_proj)"
    folders = [adapter(tmp_path / str(s), clip, seed=s, task_type=None, target_modules=target) for s in (1, 2)]
    assert_one_expert_is_plain(folders[0], clip)
    model = routed(folders, clip, top_k=1)
    assert_layers_match(model, folders, clip, top_k=1)
    assert all(name.startswith("text_model.") for name in model.base_model.routed_layers())


@pytest.mark.parametrize("attention", ["SelfAttention", "EncDecAttention"])
def test_one_kind_of_attention(tmp_path, attention):
    target = rf".*{attention}\.(q|v)"
    folders = [adapter(tmp_path / str(s), t5, seed=s, task_type="SEQ_2_SEQ_LM", target_modules=target) for s in (1, 2)]
    assert_one_expert_is_plain(folders[0], t5)
    model = routed(folders, t5, top_k=1)
    assert_layers_match(model, folders, t5, top_k=1)
    assert all(attention in name for name in model.base_model.routed_layers())


def test_disjoint_modules_of_an_encoder_decoder(tmp_path):
    """A self-attention and a cross-attention expert: each is the only candidate in its own modules."""
    folders = [
        adapter(tmp_path / kind, t5, seed=s, task_type="SEQ_2_SEQ_LM", target_modules=rf".*{kind}\.(q|v)")
        for s, kind in enumerate(("SelfAttention", "EncDecAttention"), 1)
    ]
    model = routed(folders, t5, top_k=1)
    with model.trace_routing() as trace:
        logits(model, **inputs_of(t5))
    for name in trace:
        expected = 0 if ".SelfAttention." in name else 1
        assert (trace[name].top_k_index == expected).all()


@pytest.mark.parametrize("pattern", [{"q_proj": 8}, {"v_proj": 8}], ids=["first seen", "last seen"])
def test_rank_differs_on_one_module(tmp_path, pattern):
    folders = [adapter(tmp_path / "a", r=4), adapter(tmp_path / "b", seed=2, r=4, rank_pattern=pattern)]
    assert_layers_match(routed(folders, top_k=1), folders, top_k=1)


def test_disjoint_layers_have_one_candidate_each(tmp_path):
    """Expert a on layer 0, expert b on layer 1: no choice to make, and the trace says so instead of hiding it."""
    folders = {
        name: adapter(tmp_path / name, seed=layer + 1, layers_to_transform=[layer]) for layer, name in enumerate("ab")
    }
    model = routed(folders, top_k=2)
    assert_layers_match(model, list(folders.values()), top_k=2)
    with model.trace_routing() as trace:
        logits(model)
    for layer in (0, 1):
        routing = trace[f"model.layers.{layer}.self_attn.q_proj"]
        assert (routing.top_k_index[..., 0] == layer).all() and (routing.top_k_index[..., 1] == -1).all()
        assert (routing.top_k_weights[..., 0] == 1).all() and (routing.top_k_weights[..., 1] == 0).all()


def test_top_k_is_clamped_per_layer(tmp_path):
    """Expert a on both layers, b on layer 1 only: top_k=2 takes one expert in layer 0 and two in layer 1."""
    folders = [adapter(tmp_path / "a"), adapter(tmp_path / "b", seed=2, layers_to_transform=[1])]
    assert_layers_match(routed(folders, top_k=2), folders, top_k=2)


REFUSED = {
    "use_dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "embed_tokens": {"target_modules": ["q_proj", "embed_tokens"]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1]},
}


@pytest.mark.parametrize("feature", REFUSED)
@pytest.mark.parametrize("place", ["alone", "beside a plain one"])
def test_what_is_not_a_plain_update_is_refused(tmp_path, trio, feature, place):
    bad = adapter(tmp_path / "bad", **REFUSED[feature])
    with pytest.raises(ValueError, match=rf"(?s)'bad'.*{feature}.*not supported"):
        routed([bad] if place == "alone" else [trio["one"], bad])


@pytest.mark.parametrize("kind", ["loha", "prompt tuning"])
def test_other_methods_are_refused(tmp_path, trio, kind):
    made = {
        "loha": lambda: LoHaConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
        "prompt tuning": lambda: PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    }
    get_peft_model(llama(), made[kind]()).save_pretrained(tmp_path / "bad")
    with pytest.raises(ValueError, match=r"'bad'.*peft_type is '(LOHA|PROMPT_TUNING)'; only 'LORA'"):
        routed([trio["one"], tmp_path / "bad"])


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("damage", ["no matching key", "one key missing"])
def test_incomplete_file_is_refused_at_any_position(tmp_path, trio, damage, position):
    def edit(tensors):
        if damage == "one key missing":
            del tensors[next(key for key in tensors if "lora_B" in key)]
        else:
            for key in list(tensors):
                tensors[key.replace("layers", "blocks")] = tensors.pop(key)

    bad = adapter(tmp_path / "bad")
    edit_tensors(bad, edit)
    folders = [trio["one"]]
    folders.insert(position, bad)
    with pytest.raises(ValueError, match="'bad'.*(missing|no module)"):
        routed(folders)


def test_dropout_of_an_expert_acts_in_training(tmp_path):
    """The same dropout as the plain adapter's: one expert, one seed, equal outputs in training mode."""
    folder = adapter(tmp_path / "one", lora_dropout=0.9)
    models = [
        PeftModel.from_pretrained(llama(), folder, is_trainable=True),
        routed([folder], top_k=1, is_trainable=True),
    ]
    answers = []
    for model in models:
        model.train()
        torch.manual_seed(3)
        answers.append(logits(model))
    assert difference(answers[0], logits(plain(folder))) > VISIBLE, "dropout has no effect"
    assert difference(*answers) <= TOLERANCE


def test_adapter_of_another_width_names_the_file(tmp_path, trio):
    wide = adapter(tmp_path / "wide", lambda: llama(hidden_size=64))
    with pytest.raises(ValueError, match=r"'wide'.*q_proj maps 64 to 64 features in the adapter, 32 to 32"):
        routed([trio["one"], wide])
