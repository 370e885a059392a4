"""What the training tests share: data, a quiet trainer, and readings of a model that use none of its own functions."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer


ROWS = [{"prompt": f"{letter}:", "completion": f" {letter * 3}"} for letter in "abcdefgh"]
BANKS = {True: ("arrow_lora_A", "arrow_lora_B"), False: ("arrow_lora_frozen_A", "arrow_lora_frozen_B")}


def token_batch(rows: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens that are their own labels; the global random state is kept."""
    ids = torch.randint(4, 100, (rows, 9), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def arguments(config_class, folder: Path, **options):
    """Arguments of a TRL trainer for three quiet steps in float32 on the CPU."""
    quiet = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "weight_decay": 0.1,
        "max_length": 32,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
    return config_class(**{**quiet, **options})


class PrototypeWatch(TrainerCallback):
    """Compares the prototypes that a step's forward used with the exact ones, before the weights change."""

    def __init__(self) -> None:
        self.errors: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.errors.append(prototype_error(model))


def sft(model, tokenizer, folder: Path, *, rows=None, peft_config=None, callbacks=(), resume=None, **options):
    """Train with SFTTrainer and return the trainer."""
    trainer = SFTTrainer(
        model=model,
        args=arguments(SFTConfig, folder, **options),
        train_dataset=Dataset.from_list(ROWS if rows is None else rows),
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def factors(model, adapter_name: str = "default") -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]:
    """Copies of (A, B) by module and expert name, cut out of the banks by hand."""
    found = {}
    names = model.peft_config[adapter_name].expert_names
    for module, layer in model.base_model.routed_layers().items():
        experts = layer.experts[adapter_name]
        for is_main, (name_A, name_B) in BANKS.items():
            if adapter_name not in getattr(layer, name_A):
                continue
            lora_A, lora_B = (getattr(layer, name)[adapter_name].weight.detach() for name in (name_A, name_B))
            start = 0
            for position, rank, in_main in zip(experts.positions, experts.ranks, experts.trainable):
                if in_main == is_main:
                    piece = slice(start, start + rank)
                    found[module, names[position]] = (lora_A[piece].clone(), lora_B[:, piece].clone())
                    start += rank
            assert start == lora_A.shape[0] == lora_B.shape[1], "the banks hold exactly these experts"
    return found


def stored_prototypes(model, adapter_name: str = "default") -> dict[tuple[str, str], torch.Tensor]:
    """Copies of the prototypes that the layers hold, by module and expert name; nothing is built for it."""
    names = model.peft_config[adapter_name].expert_names
    return {
        (module, names[position]): layer.arrow_lora_router[adapter_name].weight[row].detach().clone()
        for module, layer in model.base_model.routed_layers().items()
        for row, position in enumerate(layer.experts[adapter_name].positions)
    }


def prototype_error(model, adapter_name: str = "default") -> float:
    """Largest distance of a stored prototype from the exact one, up to sign: SVD of the dense update in float64."""
    stored = stored_prototypes(model, adapter_name)
    errors = []
    for key, (lora_A, lora_B) in factors(model, adapter_name).items():
        exact = torch.linalg.svd(lora_B.double() @ lora_A.double(), full_matrices=False).Vh[0]
        row = stored[key].double()
        errors.append(min((row - exact).norm().item(), (row + exact).norm().item()))
    assert errors
    return float("nan") if any(error != error for error in errors) else max(errors)


def changed(before: dict, after: dict) -> dict[str, set[str]]:
    """Expert names by what happened to them: `all` tensors changed, `some`, or `none` (bit for bit)."""
    assert before.keys() == after.keys()
    moves: dict[str, list[bool]] = {}
    for (module, name), pair in before.items():
        moves.setdefault(name, []).extend(not torch.equal(x, y) for x, y in zip(pair, after[module, name]))
    kinds = {name: "all" if all(moved) else "some" if any(moved) else "none" for name, moved in moves.items()}
    return {kind: {name for name in kinds if kinds[name] == kind} for kind in ("all", "some", "none")}


def factors_of_folders(folders: dict[str, str]) -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]:
    """(A, B) by module and adapter name, read from plain PEFT adapters."""
    found = {}
    for name, folder in folders.items():
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
        for key, tensor in tensors.items():
            if key.endswith("lora_A.weight"):
                module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                found[module, name] = (tensor, tensors[key.replace("lora_A", "lora_B")])
    return found


def logits(model, seed: int = 5) -> torch.Tensor:
    """Logits of a fixed batch in eval mode, without gradients."""
    training = model.training
    model.eval()
    with torch.no_grad():
        answer = model(input_ids=token_batch(2, seed)["input_ids"]).logits
    model.train(training)
    return answer


def relative_difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference relative to the largest entry."""
    return ((left - right).abs().max() / right.abs().max()).item()
