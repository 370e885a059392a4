"""A run resumed from a checkpoint ends where the uninterrupted run ends, bit for bit, with one bank and with two."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from peft_arrow import ArrowLoraConfig, ArrowLoraModel
from tests.pico import pico_base, pico_tokenizer
from tests.training.helpers import ROWS, arguments, changed, factors, logits, prototype_error, sft


OPTIONS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}


def start(kind: str, folders: dict[str, str], seed: int = 0):
    """(model, peft_config); fresh experts start from `seed`."""
    if kind == "fresh":
        torch.manual_seed(seed)
        targets = ["q_proj", "v_proj"]
        config = ArrowLoraConfig(
            num_experts=3, r=4, top_k=1, target_modules=targets, task_type="CAUSAL_LM", init_weights=False
        )
        return pico_base(), config
    subset = {"trainable_experts": ["dates"]} if "subset" in kind else {}
    if "ready" in kind:
        return ArrowLoraModel.from_pretrained(pico_base(), folders, is_trainable=True, top_k=1, **subset), None
    return pico_base(), ArrowLoraConfig(adapters=folders, top_k=1, **subset)


def run(kind: str, folders: dict[str, str], folder, **options):
    model, config = start(kind, folders)
    return sft(model, pico_tokenizer(), folder, peft_config=config, **{**OPTIONS, **options}).model


@pytest.mark.parametrize("kind", ["fresh", "subset", "ready", "ready subset"])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
def test_resume_equals_the_uninterrupted_run(kind, options, adapter_folders, tmp_path):
    whole = run(kind, adapter_folders, tmp_path / "whole", **options)
    halfway = tmp_path / "whole" / "checkpoint-2"
    assert (halfway / "adapter_model.safetensors").exists()
    resumed = run(kind, adapter_folders, tmp_path / "resumed", resume=str(halfway), **options)

    before, after = factors(whole), factors(resumed)
    assert changed(before, after)["none"] == set(whole.peft_config["default"].expert_names)
    assert torch.equal(logits(whole), logits(resumed))
    assert prototype_error(resumed) < 1e-4


def test_the_second_half_matters(adapter_folders, tmp_path):
    """What the test above compares differs between the two halves, so that an ignored checkpoint would be seen."""
    half = run("subset", adapter_folders, tmp_path / "half", max_steps=2)
    whole = run("subset", adapter_folders, tmp_path / "whole")
    assert changed(factors(half), factors(whole))["all"] == {"dates"}


def test_the_best_checkpoint_is_loaded_at_the_end(adapter_folders, tmp_path):
    """`load_best_model_at_end` puts old weights over new ones under the same adapter name."""
    rows = Dataset.from_list(ROWS)
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 1.0}
    args = arguments(SFTConfig, tmp_path, **{**OPTIONS, **options, "greater_is_better": True})
    model, config = start("subset", adapter_folders)
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=pico_tokenizer(),
        peft_config=config,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-2"), "old weights come back"
    again, _ = start("ready subset", adapter_folders)
    again.load_adapter(best, "default", is_trainable=True)
    assert changed(factors(again), factors(trainer.model))["none"] == {"plurals", "dates", "sql"}
    assert torch.equal(logits(trainer.model), logits(again))
    assert prototype_error(trainer.model) < 1e-4
