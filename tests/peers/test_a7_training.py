"""A.7: what is said to train trains, by every trainer, and a model that would train nothing says so."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from peft_arrow import ArrowLoraConfig, ArrowLoraModel

from ..pico import pico_adapter, pico_base, pico_tokenizer
from .adapters import VISIBLE, adapter, difference, logits, routed
from .bases import llama, token_ids


def trainable(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_counted_parameters_are_the_experts(trio, capsys):
    """No dead parameters: what is counted as trainable gets a gradient in one backward."""
    ids = token_ids()
    model = get_peft_model(llama(), ArrowLoraConfig(adapters=trio, top_k=1))
    found = trainable(model)
    q, v = 4 * (32 + 32), 4 * (32 + 16)
    assert sum(p.numel() for p in found.values()) == 3 * 2 * (q + v)
    model.print_trainable_parameters()
    assert f"trainable params: {3 * 2 * (q + v):,}" in capsys.readouterr().out
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("route", ["from_pretrained", "PeftModel"])
def test_is_trainable(tmp_path, trio, route):
    routed(trio).save_pretrained(tmp_path / "routed")
    make = {
        "from_pretrained": lambda flag: ArrowLoraModel.from_pretrained(llama(), trio, is_trainable=flag),
        "PeftModel": lambda flag: PeftModel.from_pretrained(llama(), tmp_path / "routed", is_trainable=flag),
    }[route]
    assert not trainable(make(False))
    names = trainable(make(True))
    assert names and all("arrow_lora_A" in name or "arrow_lora_B" in name for name in names)


def test_set_requires_grad(trio):
    """PEFT's switch, for a model that was loaded for inference."""
    model = routed(trio)
    model.set_requires_grad(["default"])
    before = logits(model)
    assert trainable(model)
    ids = token_ids()
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    assert difference(logits(model.eval()), before) > VISIBLE


def test_backward_of_an_inference_model_says_what_to_do(trio):
    model = routed(trio).train()
    ids = token_ids()
    with pytest.raises(RuntimeError, match="is_trainable=True"):
        model(input_ids=ids, labels=ids).loss.backward()
    checkpointed = routed(trio).train()
    checkpointed.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="is_trainable=True"):
        checkpointed(input_ids=ids, labels=ids).loss.backward()


def test_add_adapter_and_train_it(trio):
    """The recipe of PEFT's docs, with the argument that it forgets."""
    model = routed(trio)
    before = logits(model)
    model.add_adapter("new", ArrowLoraConfig(num_experts=1, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("new")
    ids = token_ids()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert difference(logits(model), logits(llama())) > VISIBLE
    model.set_adapter("default")
    assert torch.equal(logits(model), before)


def rows() -> Dataset:
    ids = token_ids(rows=8, length=8).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer(tmp_path, trio, bf16):
    model = get_peft_model(llama(), ArrowLoraConfig(adapters=trio, top_k=1, trainable_experts=["two"]))
    weights, before = trainable(model), model.state_dict()
    frozen = {k: v.clone() for k, v in before.items() if "frozen" in k}
    options = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 0.1, "weight_decay": 0.5}
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    Trainer(
        model=model, args=TrainingArguments(str(tmp_path), bf16=bf16, **options, **quiet), train_dataset=rows()
    ).train()
    after = trainable(model)
    assert weights and all(difference(after[name], weights[name]) > VISIBLE for name in weights)
    assert frozen and all(torch.equal(model.state_dict()[name], value) for name, value in frozen.items())


@pytest.fixture
def pico(tmp_path) -> list[str]:
    return [pico_adapter(tmp_path / str(s), seed=s, r=4, target_modules=["q_proj", "v_proj"]) for s in (1, 2)]


def sft(model, folder, **options) -> SFTTrainer:
    texts = Dataset.from_list([{"prompt": f"plural of item{i}:", "completion": f" item{i}s"} for i in range(8)])
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    steps = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 0.1}
    peft_config = options.pop("peft_config", None)
    return SFTTrainer(
        model=model,
        args=SFTConfig(str(folder), **steps, **quiet, **options),
        train_dataset=texts,
        processing_class=pico_tokenizer(),
        peft_config=peft_config,
    )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("route", ["peft_config", "ready model"])
def test_sft_trainer(tmp_path, pico, route, checkpointing, bf16):
    """TRL's default (bf16, checkpointing) and the rest: every parameter that counts as trainable moves."""
    config = ArrowLoraConfig(adapters=pico, top_k=1)
    options = {"bf16": bf16, "gradient_checkpointing": checkpointing}
    if route == "peft_config":
        trainer = sft(pico_base(), tmp_path, peft_config=config, **options)
    else:
        trainer = sft(get_peft_model(pico_base(), config), tmp_path, **options)
    before = trainable(trainer.model)
    trainer.train()
    after = trainable(trainer.model)
    assert before and all(not torch.equal(after[name], before[name]) for name in before)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_trainer_on_an_inference_model(tmp_path, pico, checkpointing):
    """PEFT's Arrow prints a loss and changes nothing; here it stops and says what to pass."""
    model = ArrowLoraModel.from_pretrained(pico_base(), pico)
    trainer = sft(model, tmp_path, bf16=False, gradient_checkpointing=checkpointing)
    with pytest.raises(RuntimeError, match="is_trainable=True"):
        trainer.train()


def test_trainable_experts_are_checked(trio):
    with pytest.raises(ValueError, match=r"trainable_experts holds 'nobody'.*experts are \['one', 'two', 'three'\]"):
        get_peft_model(llama(), ArrowLoraConfig(adapters=trio, trainable_experts=["nobody"]))
    with pytest.raises(ValueError, match="trainable_experts='one' is not allowed"):
        ArrowLoraConfig(adapters=trio, trainable_experts="one")


def test_mixed_ranks_train(tmp_path, mixed):
    model = get_peft_model(llama(), ArrowLoraConfig(adapters=mixed, top_k=2))
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    one = get_peft_model(llama(), ArrowLoraConfig(adapters=[adapter(tmp_path / "x", r=3)], top_k=1))
    assert trainable(one)
