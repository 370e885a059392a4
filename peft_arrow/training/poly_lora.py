"""A Poly model as one plain LoRA a task, exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, PolyConfig
from safetensors.torch import load_file, save_file

from ..library.folders import new_folder
from .data import Examples
from .poly import MODEL_NAME
from .record import TrainingRecord
from .stage import Stage


_A = ".poly_lora_A"


_EPSILON = 1e-12  # PEFT's, in the sum that the weights are divided by


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
        revision=config.revision,
        inference_mode=True,
    )
    with new_folder(folder) as draft:
        save_file(dict(tensors), draft / "adapter_model.safetensors", {"format": "pt"})
        lora.save_pretrained(str(draft))
        record.write(draft)
