"""Run by `accelerate launch` in each process of `test_distributed.py`: train, save, and write what happened.

    accelerate launch --num_processes 2 ... distributed_run.py FOLDER

FOLDER holds `adapters.json`, the folders of the adapters by name. For each case the losses of all steps, logits after
the last one and the saved model are left in FOLDER/<case>. In one process `train` takes the rows of both.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from peft import get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from peft_arrow import ArrowLoraConfig
from tests.pico import pico_base


CASES = {"all": {}, "subset": {"trainable_experts": ["dates"]}, "frozen": {"prototype_update": "frozen"}}
STEPS = 3
ROWS = 4  # a step, over all processes
LEARNING_RATE = 0.1


def token_rows(count: int) -> torch.Tensor:
    """Rows of eight tokens, the same in every process."""
    return torch.randint(4, 100, (count, 8), generator=torch.Generator().manual_seed(7))


def routed_model(adapters: dict[str, str], case: str):
    """A trainable routed model; hard routing, so that prototypes of older weights give other losses."""
    return get_peft_model(pico_base(), ArrowLoraConfig(adapters=adapters, top_k=1, **CASES[case]))


def train(accelerator: Accelerator, adapters: dict[str, str], case: str) -> tuple[torch.nn.Module, list[float]]:
    """A few steps of AdamW with weight decay; returns the prepared model and the mean loss of each step."""
    model = routed_model(adapters, case).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.1)
    loader = DataLoader(token_rows(ROWS * STEPS), batch_size=ROWS // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    return model, _steps(accelerator, model, optimizer, loader)


def _steps(accelerator: Accelerator, model, optimizer, loader) -> list[float]:
    losses = []
    for batch in loader:
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach().reshape(1)).mean().item())
    return losses


def train_sharded_leaves(accelerator: Accelerator, adapters: dict[str, str]) -> tuple[torch.nn.Module, list[float]]:
    """As `train`, with `fully_shard` on the experts' own linear modules instead of on decoder layers."""
    model = routed_model(adapters, "all").train()
    for layer in model.base_model.routed_layers().values():
        for container in (layer.arrow_lora_A, layer.arrow_lora_B, layer.arrow_lora_router):
            fully_shard(container["default"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.1)
    loader = DataLoader(token_rows(ROWS * STEPS), batch_size=ROWS // accelerator.num_processes)
    return model, _steps(accelerator, model, optimizer, accelerator.prepare_data_loader(loader))


def logits_of(model) -> torch.Tensor:
    """Logits of two rows that were not trained on."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=token_rows(ROWS * STEPS + 2)[-2:]).logits.float()


def save(accelerator: Accelerator, model, losses: list[float], folder: Path) -> None:
    """What a training script saves, and the losses and logits beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    logits = logits_of(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    is_leaves = folder.name == "leaves"
    state_dict = get_model_state_dict(model, options=options) if is_leaves else accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder, state_dict=state_dict)
        torch.save(logits, folder / "logits.pt")
        (folder / "losses.json").write_text(json.dumps({"losses": losses, "processes": accelerator.num_processes}))
    accelerator.wait_for_everyone()


def use_fsdp2(accelerator: Accelerator) -> None:
    """Turn on the FSDP2 that the launch configuration asks for; accelerate does so only where there is a GPU."""
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    for state in (PartialState(), accelerator.state):
        state.distributed_type = DistributedType.FSDP


def main(root: Path, mode: str) -> None:
    adapters = json.loads((root / "adapters.json").read_text())
    accelerator = Accelerator(cpu=True)
    if mode == "fsdp2":
        use_fsdp2(accelerator)
    cases = ["all", "subset"]
    for case in cases:
        model, losses = train(accelerator, adapters, case)
        save(accelerator, model, losses, root / case)
        accelerator.free_memory()
    if mode == "fsdp2":
        save(accelerator, *train_sharded_leaves(accelerator, adapters), root / "leaves")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
