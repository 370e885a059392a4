"""What every step shares: the config, the folder, the rows, and the base, which is loaded once a process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from peft_arrow import AdapterLibrary
from peft_arrow.quickstart.base import load_base, silence_known_warnings
from peft_arrow.training.recipe import WARMUP

from .data import Suites, read_suites


@dataclass(frozen=True)
class Setting:
    """One replication.

    Args:
        config (`dict`): as read from the YAML file.
        root (`Path`): the folder of all that is made.
        data (`Path`): the folder with `train_suite`, `heldout_sni` and `heldout_benchmarks`.
        seed (`int`): of all libraries, of the adaptation and of the pairs.
    """

    config: dict[str, Any]
    root: Path
    data: Path
    seed: int = 0

    @cached_property
    def suites(self) -> Suites:
        """The tasks and their rows."""
        return read_suites(self.data, self.config.get("tasks"))

    @cached_property
    def base(self) -> tuple[Any, Any]:
        """The base model and its tokenizer."""
        silence_known_warnings()
        model, tokenizer = load_base(self.config["base"], getattr(torch, self.config["dtype"]))
        if self.config.get("attention"):
            model.set_attn_implementation(self.config["attention"])
        if torch.accelerator.is_available():
            model.to(torch.accelerator.current_accelerator())
        return model, tokenizer

    def sft(self, seed: int, learning_rate: float | None = None) -> dict[str, Any]:
        """Fields of the trainer's config."""
        training = self.config["training"]
        return {
            "learning_rate": learning_rate or training["learning_rate"],
            "per_device_train_batch_size": training["rows_a_step"],
            "gradient_accumulation_steps": 1,
            "max_grad_norm": 1.0,
            WARMUP: 0,
            "max_length": self.config["max_tokens"],
            "seed": seed,
            "save_steps": 20,
        }

    def lora(self) -> dict[str, Any]:
        """Fields of the adapters' config."""
        training = self.config["training"]
        return {
            "r": training["rank"],
            "lora_alpha": training["alpha"],
            "lora_dropout": 0.0,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        }

    def library_folder(self, name: str) -> Path:
        """Where the library of a name such as `mbc-0` lies."""
        return self.root / "libraries" / name

    def library(self, name: str) -> AdapterLibrary:
        """A trained library."""
        return AdapterLibrary.from_pretrained(self.library_folder(name))

    def groups(self, name: str) -> dict[str, list[str]]:
        """Expert of a trained library -> its tasks."""
        return {expert: list(tasks) for expert, tasks in self.library(name).notes.made["groups"].items()}

    def write(self, name: str, content: Any) -> Path:
        """Write JSON in one step, so that a file is whole where it exists."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.draft")
        draft.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.replace(path)
        return path


def read_config(path: Path) -> dict[str, Any]:
    """A YAML file; where it is `like` another one beside it, its lines take the place of that one's."""
    read = yaml.safe_load(path.read_text(encoding="utf-8"))
    first = read_config(path.with_name(read.pop("like"))) if "like" in read else {}
    for key, value in read.items():
        first[key] = {**first[key], **value} if isinstance(first.get(key), dict) else value
    return first


def read_setting(config: Path, root: Path, data: Path, seed: int = 0) -> Setting:
    """The setting of a YAML file, whose libraries are named by their kind: here they get the seed, as in `mbc-0`."""
    read = read_config(config)
    judging, adapting = read["judging"], read["adapting"]
    read["waves"] = [[f"{kind}-{seed}" for kind in wave] for wave in read["waves"]]
    judging["groups"] = {group: [f"{kind}-{seed}" for kind in kinds] for group, kinds in judging["groups"].items()}
    adapting["methods"] = {
        way: [method, f"{kind}-{seed}" if kind else None] for way, (method, kind) in adapting["methods"].items()
    }
    return Setting(read, root, data, seed)


def kind_and_seed(name: str) -> tuple[str, int]:
    """`mbc-0` as ("mbc", 0)."""
    kind, _, seed = name.rpartition("-")
    return kind, int(seed)
