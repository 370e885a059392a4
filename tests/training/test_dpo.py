"""DPOTrainer on a ready routed model: its reference copy is the policy at step 0 and stays there."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer

from peft_arrow import ArrowLoraModel
from tests.pico import pico_base, pico_tokenizer
from tests.training.helpers import arguments, changed, factors, logits, prototype_error, token_batch


ROWS = [{"prompt": f"{c}:", "chosen": f" {c * 3}", "rejected": f" {c.upper()}?"} for c in "abcdefgh"]
SUBSETS = {"one bank": None, "two banks": ["dates"]}


def trainer_for(model, folder, **options) -> DPOTrainer:
    args = arguments(DPOConfig, folder, logging_strategy="steps", logging_steps=1, **options)
    trainer = DPOTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(ROWS), processing_class=pico_tokenizer()
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def policy(folders: dict[str, str], subset: list[str] | None):
    return ArrowLoraModel.from_pretrained(pico_base(), folders, top_k=1, is_trainable=True, trainable_experts=subset)


def step_without_a_forward_after(model) -> None:
    """One optimizer step, after which the layers' prototypes are those of older weights until somebody asks."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.2)
    model(**token_batch()).loss.backward()
    optimizer.step()
    model.zero_grad()
    assert prototype_error(model) > 0.1


@pytest.mark.parametrize("subset", SUBSETS.values(), ids=SUBSETS)
@pytest.mark.parametrize("history", ["fresh", "used", "trained"])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
def test_the_reference_is_the_policy_at_step_0(subset, history, options, adapter_folders, tmp_path):
    model = policy(adapter_folders, subset)
    if history == "used":
        logits(model)
    elif history == "trained":
        step_without_a_forward_after(model)
    before = factors(model)
    trainer = trainer_for(model, tmp_path, **options)
    assert set(model.peft_config) == {"default", "ref"}
    expected = logits(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)
    assert prototype_error(model, "ref") < 1e-5
    model.set_adapter("default")
    trained = {"plurals", "dates", "sql"} if subset is None else set(subset)
    assert any(parameter.requires_grad for parameter in model.parameters())

    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(losses[-1] - math.log(2)) > 1e-3, "the policy has moved away from its reference"
    assert changed(before, factors(model, "ref"))["none"] == {"plurals", "dates", "sql"}
    assert changed(before, factors(model))["all"] == trained
    assert not torch.equal(logits(model), expected)
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)
