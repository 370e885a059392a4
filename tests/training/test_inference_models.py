"""A model that was loaded for inference and is then trained says so, whoever asks; eval mode stays usable."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from peft_arrow import ArrowLoraConfig, ArrowLoraModel
from tests.pico import pico_base, pico_tokenizer
from tests.training.helpers import changed, factors, sft, token_batch


@pytest.fixture(params=["ArrowLoraModel", "PeftModel", "trainable_experts=[]"])
def frozen(request, adapter_folders, tmp_path):
    """A routed model of which nothing trains."""
    if request.param == "ArrowLoraModel":
        return ArrowLoraModel.from_pretrained(pico_base(), adapter_folders, top_k=1)
    if request.param == "PeftModel":
        ArrowLoraModel.from_pretrained(pico_base(), adapter_folders, top_k=1).save_pretrained(tmp_path / "routed")
        return PeftModel.from_pretrained(pico_base(), tmp_path / "routed")
    config = ArrowLoraConfig(adapters=adapter_folders, top_k=1, trainable_experts=[])
    return get_peft_model(pico_base(), config)


def backward(model, folder):
    model.train()
    model(**token_batch()).loss.backward()


def checkpointed_backward(model, folder, **kwargs):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    model.enable_input_require_grads()
    backward(model, folder)


def plain_trainer(model, folder):
    batch = token_batch(4)
    rows = Dataset.from_dict({key: tensor.tolist() for key, tensor in batch.items()})
    args = TrainingArguments(
        output_dir=str(folder), max_steps=1, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    Trainer(model=model, args=args, train_dataset=rows).train()


WAYS = {
    "backward": backward,
    "reentrant backward": lambda model, folder: checkpointed_backward(model, folder, use_reentrant=True),
    "not reentrant backward": lambda model, folder: checkpointed_backward(model, folder, use_reentrant=False),
    "Trainer": plain_trainer,
    "SFTTrainer": lambda model, folder: sft(model, pico_tokenizer(), folder),
    "SFTTrainer checkpointing": lambda model, folder: sft(
        model, pico_tokenizer(), folder, gradient_checkpointing=True, bf16=True
    ),
    "SFTTrainer reentrant": lambda model, folder: sft(
        model,
        pico_tokenizer(),
        folder,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    ),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_training_raises_and_names_is_trainable(way, frozen, tmp_path):
    before = factors(frozen)
    with pytest.raises(RuntimeError, match="is_trainable=True"):
        way(frozen, tmp_path / "run")
    assert changed(before, factors(frozen))["none"] == {"plurals", "dates", "sql"}


def test_gradients_of_the_inputs_in_eval_mode(frozen):
    """Attribution methods need them; nothing is trained, so nothing is raised."""
    frozen.eval()
    embeddings = frozen.get_input_embeddings()(token_batch()["input_ids"]).detach().requires_grad_()
    frozen(inputs_embeds=embeddings).logits.square().sum().backward()
    assert embeddings.grad.abs().max() > 0
    with frozen.disable_adapter():
        plain = frozen(inputs_embeds=embeddings).logits.square().sum()
    (without,) = torch.autograd.grad(plain, embeddings)
    assert not torch.allclose(without, embeddings.grad), "the gradient goes through the experts"


def test_train_mode_without_gradients_does_not_raise(frozen):
    frozen.train()
    with torch.no_grad():
        frozen(**token_batch())
    with torch.inference_mode():
        frozen(**token_batch())


def test_something_else_that_trains_is_no_error(frozen):
    """A head or an embedding of the base may be trained with the experts as they are."""
    head = frozen.get_base_model().lm_head
    head.weight.requires_grad_()
    frozen.train()
    frozen(**token_batch()).loss.backward()
    assert head.weight.grad.abs().max() > 0


def test_a_model_made_trainable_afterwards_trains(adapter_folders):
    """PEFT's own way: `set_adapter(..., inference_mode=False)` after loading for inference."""
    model = ArrowLoraModel.from_pretrained(pico_base(), adapter_folders, top_k=3)
    model.set_adapter("default", inference_mode=False)
    backward(model, None)
    gradients = {n: p.grad for n, p in model.named_parameters() if "arrow_lora_B" in n}
    assert gradients and all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())
