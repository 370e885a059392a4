"""Poly and MHR (arXiv 2202.13914, 2211.03831): skills shared by all tasks, trained with PEFT, saved as plain LoRAs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from peft import LoraConfig, PeftModel, PolyConfig
from peft.tuners.poly import PolyLayer
from safetensors.torch import load_file, save_file
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..library.folders import new_folder
from .base import Base
from .data import Examples, check_lengths, joined
from .expert import Job, Plan, finished
from .fitting import checkpoints_of
from .groups import Stage, try_job
from .processes import Processes
from .recipe import lora_arguments, sft_arguments, telling
from .record import TrainingRecord


TASK_COLUMN = "task_ids"
# The learning rate of the tasks' weights over the skills: mttl's, far above that of the skills.
ROUTER_LEARNING_RATE = 0.1
MODEL_NAME = "poly"
_A = ".poly_lora_A"
_EPSILON = 1e-12  # PEFT's, in the sum that the weights are divided by


class TaskCollator:
    """TRL's batches, with the number of each row's task beside it."""

    def __init__(self, pad_token_id: int) -> None:
        self._inner = DataCollatorForLanguageModeling(pad_token_id=pad_token_id)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """One batch."""
        batch = self._inner([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
        batch[TASK_COLUMN] = torch.tensor([row[TASK_COLUMN] for row in rows])
        return batch


def train_poly(
    base: Base,
    parts: Mapping[str, Examples],
    folder: Path,
    plan: Plan,
    processes: Processes,
    *,
    steps: int,
    n_skills: int = 8,
    n_splits: int = 1,
    progress: bool = True,
) -> Stage:
    """Train one Poly model on all tasks together; the first process trains it. `n_splits` above 1 is MHR.

    PEFT's Poly has a rank and no alpha (its scale is 1 / r), and no dropout; of `lora_config` it takes `r` and
    `target_modules`.

    Args:
        base, plan, processes, progress: as in `train_stage`.
        parts (`Mapping[str, Examples]`): task -> its rows.
        folder (`Path`): of the stage; the model lies in `folder/poly`.
        steps (`int`): optimizer steps.
        n_skills (`int`): LoRAs in each layer that the tasks share.
        n_splits (`int`): parts of a layer's features with weights of their own.

    Raises:
        ValueError: rows or configs are bad, or it was trained in another way before.
    """
    job = _plan_poly(base, parts, folder / MODEL_NAME, plan, steps, n_skills, n_splits)
    reasons = []
    if processes.from_main(finished(job, plan.overwrite) is None):
        reasons = [try_job(base, job, plan, processes, progress) for _ in processes.mine([MODEL_NAME])]
    failed = [reason for reason in processes.gather(reasons) if reason is not None]
    if failed:
        return Stage(MODEL_NAME, folder, {}, {MODEL_NAME: failed[0]})
    return Stage(MODEL_NAME, folder, {MODEL_NAME: TrainingRecord.read(job.folder)}, {})


def _plan_poly(
    base: Base, parts: Mapping[str, Examples], folder: Path, plan: Plan, steps: int, n_skills: int, n_splits: int
) -> Job:
    arguments = sft_arguments(plan.sft_config, checkpoints_of(folder), steps)
    if arguments.packing or arguments.padding_free or arguments.gradient_checkpointing:
        raise ValueError(
            "sft_config asks for packing, padding_free or gradient_checkpointing, which Poly cannot have: every row "
            "brings its task, and the forward is not repeated."
        )
    arguments.remove_unused_columns = False  # the column of the tasks
    lora = lora_arguments(plan.lora_config)
    config = PolyConfig(
        r=lora.r,
        target_modules=lora.target_modules,
        n_tasks=len(parts),
        n_skills=n_skills,
        n_splits=n_splits,
        task_type=lora.task_type,
    )
    numbered = []
    for number, (task, part) in enumerate(parts.items()):
        check_lengths(part, base.tokenizer, arguments.max_length)
        dataset = part.dataset.add_column(TASK_COLUMN, [number] * len(part.dataset))
        numbered.append(replace(part, name=task, dataset=dataset))
    whole = joined(MODEL_NAME, numbered)
    digest = hashlib.sha256(f"{list(parts)}{whole.fingerprint}".encode()).hexdigest()
    whole = replace(whole, dataset=concatenate_datasets([part.dataset for part in numbered]), fingerprint=digest)
    identity = {
        "base_model": base.name,
        "data": digest,
        "init_seed": plan.init_seed,
        **telling(arguments, config),
    }
    more = partial(_poly_options, arguments=arguments, pad_token_id=base.tokenizer.pad_token_id)
    return Job(whole, folder, arguments, config, identity, more)


def _poly_options(model: PeftModel, arguments: Any, pad_token_id: int) -> dict[str, Any]:
    """The collator, and AdamW with a learning rate of their own for the tasks' weights.

    Raises:
        ValueError: a layer whose features cannot be split evenly.
    """
    splits = model.active_peft_config.n_splits
    for name, module in model.named_modules():
        sizes = (module.in_features, module.out_features) if isinstance(module, PolyLayer) else ()
        if any(size % splits for size in sizes):
            raise ValueError(f"n_splits={splits} does not divide the features of {name}, {sizes}.")
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for name, parameter in named if "poly_router" not in name]},
        {"params": [parameter for name, parameter in named if "poly_router" in name], "lr": ROUTER_LEARNING_RATE},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        weight_decay=arguments.weight_decay,
    )
    return {"collator": TaskCollator(pad_token_id), "optimizer": optimizer}


def lora_of_task(tensors: Mapping[str, torch.Tensor], config: PolyConfig, task: int) -> dict[str, torch.Tensor]:
    """The plain LoRA that a Poly model is for one task, exactly, in eval mode.

    In eval mode a task's weights over the skills are constants, w = sigmoid(z) / sum sigmoid(z) for each split, so
    the layer is one low-rank product with A* = sum w_i A_i and B* = sum w_i B_i; its scale 1 / r is that of a
    LoRA with alpha 1.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): the saved Poly adapter.
        config (`PolyConfig`): of it.
        task (`int`): the number of the task.

    Returns:
        `dict[str, torch.Tensor]`: `lora_A` (r, in) and `lora_B` (out, r) of every module, under PEFT's names.
    """
    found = {}
    for module in [key.removesuffix(_A) for key in tensors if key.endswith(_A)]:
        skills_A, skills_B = tensors[f"{module}{_A}"].float(), tensors[f"{module}.poly_lora_B"].float()
        logits = tensors[f"{module}.poly_router.module_logits"][task].float()
        scores = torch.sigmoid(logits.view(config.n_splits, config.n_skills))
        weights = scores / (scores.sum(dim=-1, keepdim=True) + _EPSILON)
        mixed_A = torch.einsum("qs,qsdr->qdr", weights, skills_A).reshape(-1, config.r)
        mixed_B = torch.einsum("qs,qsrd->rqd", weights, skills_B).reshape(config.r, -1)
        found[f"{module}.lora_A.weight"] = mixed_A.T.contiguous()
        found[f"{module}.lora_B.weight"] = mixed_B.T.contiguous()
    return found


def convert_poly(stage: Stage, tasks: Mapping[str, Examples], folder: Path, name: str) -> Stage:
    """Write the Poly model of a stage as one plain LoRA expert a task, one after another.

    Args:
        stage (`Stage`): of `train_poly`.
        tasks (`Mapping[str, Examples]`): in the order they were trained in.
        folder (`Path`): the experts' parent.
        name (`str`): of the stage that is returned, whose steps and tokens are 0: they are those of `stage`.
    """
    source = stage.folder / MODEL_NAME
    config, whole = PolyConfig.from_pretrained(str(source)), stage.records[MODEL_NAME]
    tensors = load_file(source / "adapter_model.safetensors")
    records = {}
    for number, (task, part) in enumerate(tasks.items()):
        record = replace(
            whole, name=task, tasks=[task], steps=0, tokens=0, rows=len(part.dataset), seconds=0.0, losses=[]
        )
        records[task] = replace(record, sources=list(part.sources), identity={**whole.identity, "task": number})
        if TrainingRecord.read(folder / task) != records[task]:
            _write(lora_of_task(tensors, config, number), config, records[task], folder / task)
    return Stage(name, folder, records, {})


def _write(tensors: Mapping[str, torch.Tensor], config: PolyConfig, record: TrainingRecord, folder: Path) -> None:
    lora = LoraConfig(
        r=config.r,
        lora_alpha=1,
        target_modules=config.target_modules,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
    with new_folder(folder) as draft:
        save_file(dict(tensors), draft / "adapter_model.safetensors", {"format": "pt"})
        lora.save_pretrained(str(draft))
        record.write(draft)
