"""SFTTrainer trains routed models: from a config, ready-made, all experts or some, with the options people use."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import PeftModel

from peft_arrow import ArrowLoraConfig, ArrowLoraModel
from tests.pico import pico_base, pico_tokenizer
from tests.training.helpers import (
    PrototypeWatch,
    changed,
    factors,
    factors_of_folders,
    logits,
    prototype_error,
    relative_difference,
    sft,
)


ALL = {"plurals", "dates", "sql"}
KINDS = {  # how the trainer gets the model, and the experts that are to train
    "fresh": {"expert_0", "expert_1", "expert_2"},
    "adapters": ALL,
    "ready": ALL,
    "subset": {"dates"},
    "ready subset": {"dates", "sql"},
}
SETTINGS = {
    "plain": {},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "not reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "trl defaults": {"gradient_checkpointing": True, "bf16": True},
    "packing": {"packing": True, "gradient_checkpointing": True},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
}
RUNS = [(kind, setting) for kind in KINDS for setting in ("plain", "trl defaults")]
RUNS += [(kind, setting) for kind in ("fresh", "subset") for setting in list(SETTINGS) if (kind, setting) not in RUNS]


def model_and_config(kind: str, folders: dict[str, str]):
    """The two arguments of SFTTrainer that differ between the kinds."""
    if kind == "fresh":
        config = ArrowLoraConfig(
            num_experts=3, r=4, top_k=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        )
        return pico_base(), config
    options = {"top_k": 2}
    if "subset" in kind:
        options["trainable_experts"] = sorted(KINDS[kind])
    if "ready" in kind:
        return ArrowLoraModel.from_pretrained(pico_base(), folders, is_trainable=True, **options), None
    return pico_base(), ArrowLoraConfig(adapters=folders, **options)


def trained(kind: str, setting: str, folders: dict[str, str], folder):
    """The trained model without accelerate's wrappers, and what was seen of the prototypes on the way."""
    watch = PrototypeWatch()
    model, config = model_and_config(kind, folders)
    trainer = sft(model, pico_tokenizer(), folder / "run", peft_config=config, callbacks=[watch], **SETTINGS[setting])
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False), watch.errors


@pytest.fixture(scope="module")
def plain_runs(adapter_folders, tmp_path_factory):
    """The factors after training without checkpointing, by kind, computed when asked for."""
    done = {}

    def run(kind: str) -> dict:
        if kind not in done:
            model, _ = trained(kind, "plain", adapter_folders, tmp_path_factory.mktemp("plain"))
            done[kind] = factors(model)
        return done[kind]

    return run


@pytest.mark.parametrize(("kind", "setting"), RUNS)
def test_the_experts_train_and_the_others_do_not(kind, setting, adapter_folders, tmp_path):
    model, errors = trained(kind, setting, adapter_folders, tmp_path)
    after = factors(model)
    if kind == "fresh":
        assert {name for _, name in after} == KINDS[kind]
        assert all(lora_B.abs().max() > 1e-3 for _, lora_B in after.values())
    else:
        moves = changed(factors_of_folders(adapter_folders), after)
        assert moves["all"] == KINDS[kind]
        assert moves["none"] == ALL - KINDS[kind]
    assert all(torch.isfinite(tensor).all() for pair in after.values() for tensor in pair)

    # A fresh expert has B = 0 in its first step, where its update has no singular vector.
    checked = errors[1:] if kind == "fresh" else errors
    assert len(errors) == 3 and max(checked) < 1e-4

    expected = logits(model)
    assert prototype_error(model) < 1e-4, "the forward after the last step uses the last weights"
    model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(pico_base(), tmp_path / "saved", adapter_name="again")
    if "subset" in kind:  # two banks are added up in another order than one
        assert relative_difference(logits(again), expected) < 1e-5
    else:
        assert torch.equal(logits(again), expected)
    assert relative_difference(logits(pico_base()), expected) > 1e-3, "training or loading had no effect"


@pytest.mark.parametrize("kind", ["fresh", "subset"])
@pytest.mark.parametrize("setting", ["reentrant", "not reentrant", "accumulation"])
def test_checkpointing_and_accumulation_change_nothing(kind, setting, plain_runs, adapter_folders, tmp_path):
    other = factors(trained(kind, setting, adapter_folders, tmp_path)[0])
    for key, pair in plain_runs(kind).items():
        for expected, tensor in zip(pair, other[key]):
            # Accumulated gradients are summed in another order, and AdamW divides small ones by their size.
            assert (expected - tensor).abs().max() < (1e-3 if setting == "accumulation" else 1e-6), key


def test_weights_do_not_depend_on_how_the_trainer_got_the_model(plain_runs):
    adapters, ready = plain_runs("adapters"), plain_runs("ready")
    assert adapters.keys() == ready.keys()
    assert all(torch.equal(x, y) for key in adapters for x, y in zip(adapters[key], ready[key]))


def chat_tokenizer(folder) -> str:
    """Save a tokenizer whose chat template has tokens that the base's tokenizer lacks."""
    source = pico_tokenizer()
    source.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    source.eos_token = "<|im_end|>"
    source.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}"
    )
    source.save_pretrained(folder)
    return str(folder)


@pytest.mark.skipif(
    transformers.__version__ < "5", reason="TRL hands transformers 4 extra_special_tokens, which it does not know"
)
def test_a_chat_template_that_adds_tokens(adapter_folders, tmp_path):
    messages = [
        {"messages": [{"role": "user", "content": letter}, {"role": "assistant", "content": letter * 3}]}
        for letter in "abcdefgh"
    ]
    trainer = sft(
        pico_base(),
        pico_tokenizer(),
        tmp_path / "run",
        rows=messages,
        peft_config=ArrowLoraConfig(adapters=adapter_folders, top_k=2, trainable_experts=["dates"]),
        chat_template_path=chat_tokenizer(tmp_path / "chat"),
        max_length=64,
    )
    model = trainer.model
    config = model.peft_config["default"]
    assert config.modules_to_save == ["lm_head"]
    assert set(config.trainable_token_indices) == {"embed_tokens"}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lm_head.modules_to_save" in name for name in trainable)
    assert any("trainable_tokens_delta" in name for name in trainable)
    assert changed(factors_of_folders(adapter_folders), factors(model))["all"] == {"dates"}

    model.save_pretrained(tmp_path / "saved")
    base = pico_base()
    base.resize_token_embeddings(model.get_base_model().config.vocab_size, mean_resizing=False)
    again = PeftModel.from_pretrained(base, tmp_path / "saved")
    model.eval(), again.eval()
    start, end = trainer.processing_class.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ids = torch.tensor([[start, 20, 21, end, 22]])
    with torch.no_grad():
        assert relative_difference(again(ids).logits, model(ids).logits) < 1e-5
