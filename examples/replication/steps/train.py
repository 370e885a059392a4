"""Libraries: private, shared, by weights, at random, all with the same number of optimizer steps."""

from __future__ import annotations

from peft_arrow import train_library

from .setting import Setting, kind_and_seed


def train(setting: Setting, name: str) -> None:
    """Train a library such as `mbc-0`; experts that are there are not trained again."""
    kind, seed = kind_and_seed(name)
    model, tokenizer = setting.base
    suites = setting.suites
    train_library(
        model,
        {task: suites.train[task] for task in suites.upstream},
        kind=kind,
        output_dir=setting.library_folder(name),
        n_clusters=setting.config["clusters"],
        steps=setting.config["training"]["steps"],
        seed=seed,
        init_seed=seed,
        tokenizer=tokenizer,
        sft_config=setting.sft(seed),
        lora_config=setting.lora(),
    )
