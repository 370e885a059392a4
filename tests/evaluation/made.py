"""What the tests of the judge share: tasks made by code, and pico adapters that are trained for real."""

from __future__ import annotations

import random
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from peft_arrow import AdapterLibrary
from tests.pico import pico_adapter, pico_base, pico_tokenizer


Row = Mapping[str, str]


def random_rows(name: str, split: str, count: int, seed: int) -> list[Row]:
    """Rows with answers of three random letters: they can be learnt by heart and by no rule."""
    rng = random.Random(f"{name} {split} {seed}")
    letters = string.ascii_lowercase
    made = []
    for number in range(count):
        prompt = f"{name}{number:02d}{split[0]}{''.join(rng.choices(letters, k=4))}:"
        made.append({"prompt": prompt, "completion": "".join(rng.choices(letters, k=3)), "split": split})
    return made


def choice_rows(split: str, count: int) -> list[Row]:
    """Rows with the options yes and no."""
    return [
        {"prompt": f"{n} {split}?", "completion": "no" if n % 3 else "yes", "options": ["yes", "no"], "split": split}
        for n in range(count)
    ]


def teachable_base() -> torch.nn.Module:
    """The pico base with a head that can be sure: with the small weights of `pico_base` no loss goes below 4."""
    base = pico_base()
    with torch.no_grad():
        base.lm_head.weight.mul_(10)
    return base


def trained_adapter(folder: Path, rows: Sequence[Row], *, steps: int, seed: int = 0) -> str:
    """Train a LoRA of the teachable base on the completions of `rows`, all in every step; return its folder."""
    tokenizer = pico_tokenizer()
    encoded = []
    for row in rows:
        prompt, completion = tokenizer(row["prompt"]).input_ids, tokenizer(row["completion"]).input_ids
        ids = [*prompt, *completion, tokenizer.eos_token_id]
        encoded.append((ids, [-100] * len(prompt) + ids[len(prompt) :]))
    length = max(len(ids) for ids, _ in encoded)
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in encoded])
    labels = torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in encoded])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
        model = get_peft_model(teachable_base(), config)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
    model.save_pretrained(str(folder))
    return str(folder)


def random_library(folder: Path, names: Sequence[str] = ("a", "b", "c")) -> AdapterLibrary:
    """A library of untrained adapters with equal ranks."""
    for seed, name in enumerate(names, start=1):
        pico_adapter(folder / name, seed=seed, r=4, target_modules=["q_proj", "v_proj"])
    return AdapterLibrary.from_pretrained({name: folder / name for name in names}, "my-base")


def two_tasks(rows: int = 6) -> dict[str, list[Row]]:
    """A generation task `a` and a choice task `b`, each with rows for training."""
    return {
        "a": random_rows("a", "train", 4, 0) + random_rows("a", "eval", rows, 0),
        "b": choice_rows("train", 4) + choice_rows("eval", rows),
    }
