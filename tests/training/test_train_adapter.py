"""`train_adapter`: what comes out, what is refused before anything is written, what a restart skips or refuses."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel
from trl import SFTConfig

from peft_arrow import train_adapter
from peft_arrow.training import NotFinite
from peft_arrow.training.recipe import lora_arguments, sft_arguments
from peft_arrow.training.targets import attention_modules
from tests.pico import pico_base
from tests.training.helpers import ROWS, logits


QUICK = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 0.02, "max_length": 64}


@pytest.fixture
def base_folder(tmp_path, tokenizer) -> str:
    """A base on disk, as a name that is loaded."""
    pico_base().save_pretrained(tmp_path / "my-base")
    tokenizer.save_pretrained(tmp_path / "my-base")
    return str(tmp_path / "my-base")


def train(base, folder, rows=ROWS, **options):
    return train_adapter(
        base, rows, output_dir=folder, **{"steps": 3, "sft_config": QUICK, "progress": False, **options}
    )


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_the_recipe_is_the_papers(tmp_path, base_folder):
    arguments, lora = sft_arguments(None, tmp_path), lora_arguments(None)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (4, 16, 0.05)
    assert arguments.learning_rate == 1e-4 and arguments.lr_scheduler_type == "linear"
    assert arguments.weight_decay == 0 and arguments.max_grad_norm == 0.1
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 16
    assert arguments.get_warmup_steps(100) == 6
    train(base_folder, tmp_path / "a")
    assert json.loads((tmp_path / "a/training.json").read_text())["target_modules"] == [
        "k_proj",
        "o_proj",
        "q_proj",
        "v_proj",
    ]


def test_attention_modules_of_a_base_with_other_names():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=16))
    assert attention_modules(gpt2) == ["attn.c_proj", "c_attn"]


def test_the_adapter_loads_with_plain_peft_and_does_what_was_trained(base_folder, tmp_path):
    ref = train(base_folder, tmp_path / "letters", steps=30)
    model = PeftModel.from_pretrained(pico_base(), str(ref.source))
    record = json.loads((tmp_path / "letters/training.json").read_text())
    assert record["steps"] == len(record["losses"]) == 30 and record["losses"][-1] < record["losses"][0] - 0.1
    assert record["tokens"] == 30 * 4 * (2 + 4 + 1) and record["rows"] == 8
    assert not torch.equal(logits(model), logits(pico_base()))


def test_all_start_from_the_same_A_and_random_states_are_kept(base_folder, tmp_path):
    """With a learning rate of 0 what is saved is the start; B is zero."""
    still = {**QUICK, "learning_rate": 0.0}
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = torch.rand(3), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    train(base_folder, tmp_path / "a", sft_config=still)
    train(base_folder, tmp_path / "b", ROWS[:3], sft_config={**still, "seed": 7})
    train(base_folder, tmp_path / "c", sft_config=still, init_seed=7)
    assert torch.equal(torch.rand(3), expected[0]) and (random.random(), np.random.rand()) == expected[1:]
    first, second, other = (weights(tmp_path / name) for name in "abc")
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key])
        assert torch.equal(tensor, other[key]) == ("lora_B" in key)


def test_a_model_is_given_back_as_it_was(tmp_path, tokenizer):
    base = pico_base().train()
    base.lm_head.weight.requires_grad_(False)
    before, config, names = logits(base), base.config.to_dict(), list(base.state_dict())
    train(base, tmp_path / "a", tokenizer=tokenizer, sft_config={**QUICK, "gradient_checkpointing": True})
    assert torch.equal(logits(base), before) and base.config.to_dict() == config and base.training
    assert list(base.state_dict()) == names and "forward" not in base.__dict__ and not base.model_tags
    trained = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in base.named_parameters()} - {"lm_head.weight"}
    assert not base.get_input_embeddings()._forward_hooks
    assert not any(getattr(module, "gradient_checkpointing", False) for module in base.modules())


def test_configs_of_trl_and_peft_take_the_recipes_place(base_folder, tmp_path):
    args = SFTConfig(
        output_dir=str(tmp_path / "elsewhere"), max_steps=2, bf16=False, use_cpu=True, report_to="none", max_length=64
    )
    lora = LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM")
    train(base_folder, tmp_path / "a", steps=None, sft_config=args, lora_config=lora)
    assert {key.split(".")[-3] for key in weights(tmp_path / "a")} == {"down_proj"}
    assert json.loads((tmp_path / "a/training.json").read_text())["steps"] == 2
    assert not (tmp_path / "elsewhere").exists() and args.output_dir == str(tmp_path / "elsewhere")


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "aaa"}]


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": CHAT[:1], "completion": CHAT[1:]}] * 4,
        [{"messages": CHAT}] * 4,
        [{"instruction": "Say it thrice.", "input": "a", "output": "aaa"}] * 4,
        [{"text": "a aaa"}] * 4,
        Dataset.from_list(ROWS),
    ],
    ids=["chat", "messages", "instruction", "text", "dataset"],
)
def test_formats(rows, base_folder, tmp_path):
    train(base_folder, tmp_path / "a", rows, steps=1)
    assert (tmp_path / "a/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["jsonl", "folder", "saved"])
def test_files_and_folders(kind, base_folder, tmp_path):
    rows = [*({**row, "split": "train"} for row in ROWS), {"prompt": "x", "completion": "y", "split": "eval"}]
    path = tmp_path / "data"
    if kind == "saved":
        Dataset.from_list(rows).save_to_disk(path)
    else:
        path.mkdir()
        (path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    train(base_folder, tmp_path / "a", path / "train.jsonl" if kind == "jsonl" else path, steps=1)
    assert json.loads((tmp_path / "a/training.json").read_text())["rows"] == len(ROWS)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "dataset 'a' is empty"),
        ([{"prompt": "a"}], "has no column 'completion'"),
        ([{"question": "a", "answer": "b"}], r"has the columns \['question', 'answer'\]; allowed are 'prompt'"),
        ([{"prompt": "a", "completion": "b" * 70}], "completion of row 0 has 71 tokens, and max_length is 64"),
        ([*ROWS, {"prompt": "a" * 80, "completion": "b"}], "prompt and completion of row 8 has 82 tokens"),
        ([{"prompt": "a", "completion": None}], "column 'completion' of row 0 is 'None'"),
        ([{"messages": CHAT[:1]}], "must be a chat that ends with a message of the assistant"),
        ("./nowhere.jsonl", "there is no file or folder 'nowhere.jsonl'"),
        ("nobody/nothing", "was tried as a path and as an id on the Hub"),
        (3, "is a int; allowed are a Dataset"),
    ],
)
def test_bad_rows_are_refused_before_the_base_is_loaded(rows, told, base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    with pytest.raises(ValueError, match=told) as error:
        train(base_folder, tmp_path / "a", rows)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my-base"]


def test_a_file_that_is_no_json_is_named(base_folder, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{nonsense\n')
    with pytest.raises(ValueError, match=r"dataset 'a': .*bad.jsonl' cannot be read"):
        train(base_folder, tmp_path / "a", tmp_path / "bad.jsonl")


@pytest.mark.parametrize("options", [{"sft_config": {"lr": 1}}, {"lora_config": {"rank": 1}}, {"lora_config": 4}])
def test_bad_configs_are_refused(options, base_folder, tmp_path):
    with pytest.raises(ValueError, match="sft_config holds 'lr'|lora_config holds 'rank'|lora_config is a int"):
        train(base_folder, tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


def test_what_is_there_is_skipped_and_what_changed_is_named(base_folder, tmp_path, monkeypatch):
    train(base_folder, tmp_path / "a")
    first = (tmp_path / "a/adapter_model.safetensors").stat().st_mtime_ns
    train(base_folder, tmp_path / "a")
    assert (tmp_path / "a/adapter_model.safetensors").stat().st_mtime_ns == first
    with pytest.raises(ValueError, match="lora.r was 4 and is now 2, sft.max_steps was 3 and is now 4"):
        train(base_folder, tmp_path / "a", steps=4, lora_config={"r": 2})
    with pytest.raises(ValueError, match="the data is another"):
        train(base_folder, tmp_path / "a", ROWS[:4])
    train(base_folder, tmp_path / "a", steps=4, overwrite=True)
    assert json.loads((tmp_path / "a/training.json").read_text())["steps"] == 4
    (tmp_path / "b").mkdir()
    (tmp_path / "b/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else than an expert"):
        train(base_folder, tmp_path / "b")


class Killed(BaseException):
    """What no handler of ours catches, as a kill."""


def test_a_killed_run_goes_on_from_its_checkpoint(base_folder, tmp_path, monkeypatch):
    quick = {**QUICK, "save_steps": 2}
    train(base_folder, tmp_path / "whole", steps=5, sft_config=quick)

    def kill(self, args, state, control, **kwargs):
        seen.append(state.global_step)
        if state.global_step == 3 and len(seen) < 4:
            raise Killed

    seen: list[int] = []
    monkeypatch.setattr("peft_arrow.training.fitting.Watch.on_step_end", kill)
    with pytest.raises(Killed):
        train(base_folder, tmp_path / "killed", steps=5, sft_config=quick)
    broken = tmp_path / ".killed.checkpoints/checkpoint-9"
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"epoch"')
    assert not (tmp_path / "killed").exists()
    train(base_folder, tmp_path / "killed", steps=5, sft_config=quick)
    assert seen == [1, 2, 3, 3, 4, 5]
    assert not (tmp_path / ".killed.checkpoints").exists()
    one, two = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("whole", "killed"))
    assert one["losses"] == two["losses"] and one["tokens"] == two["tokens"]
    for key, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "killed")[key])


def test_a_loss_that_is_not_finite_stops_it(base_folder, tmp_path):
    with pytest.raises(NotFinite, match="(loss|grad_norm) is (nan|inf) at step"):
        train(base_folder, tmp_path / "a", sft_config={**QUICK, "learning_rate": 1e30}, steps=9)
    assert not (tmp_path / "a").exists()
