"""Run by `accelerate launch` in each process of `test_together.py`: builds under FSDP2 on CPUs.

    accelerate launch --config_file ... sharded.py FOLDER OUTPUT KIND OPTIONS

accelerate and transformers turn FSDP on where there is an accelerator only. `allow_fsdp_on_cpu` lets a CPU launch
through that one condition; the plugin, the sharding, the trainer and the checkpoints are theirs.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState

from peft_arrow import TrainingFailed, train_library
from peft_arrow.training import jobs, processes
from tests.building.data import QUICK, TASKS


TOGETHER = {"lora_config": {"lora_dropout": 0.0}, "sft_config": QUICK}
SEEN: list[str] = []


def allow_fsdp_on_cpu() -> None:
    """After accelerate made its state for a CPU launch with FSDP, do what it does where there are GPUs."""
    made = AcceleratorState.__init__

    @functools.wraps(made)
    def init(self, *arguments, fsdp_plugin=None, **options) -> None:
        made(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


def watch_sharding() -> None:
    """Write down whether all of the trainer's model was sharded."""
    fit = jobs.fit

    def watched(model, *arguments, **options):
        outcome = fit(model, *arguments, **options)
        sharded = [type(parameter).__name__ == "DTensor" for parameter in model.parameters()]
        SEEN.append("sharded" if all(sharded) else "whole")
        return outcome

    jobs.fit = watched


def fault(kind: str) -> None:
    """Make something go wrong in `task1`, on all processes or on one."""
    rank, fit = int(os.environ["RANK"]), jobs.fit
    processes.FOLLOW = timedelta(seconds=5)

    def broken(model, tokenizer, dataset, arguments, **options):
        if "task1" in arguments.output_dir:
            if kind == "nan":
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.data.fill_(float("nan"))
            if kind == "one" and rank == 1:
                raise OSError("no space left on device")
            if kind == "kill":
                options["on_step"] = lambda step, steps: os.kill(os.getpid(), 9) if step == 3 and rank == 1 else None
        return fit(model, tokenizer, dataset, arguments, **options)

    jobs.fit = broken


def main(root: str, output: str, kind: str, options: str) -> None:
    wanted = json.loads(options)
    torch.set_num_threads(1)
    allow_fsdp_on_cpu()
    watch_sharding()
    if "fault" in wanted:
        fault(wanted.pop("fault"))
    resumed, newest = [], jobs.newest_checkpoint
    jobs.newest_checkpoint = lambda folder: resumed.append(newest(folder)) or resumed[-1]
    tasks = dict(list(TASKS.items())[: wanted.pop("tasks", 2)])
    failures = {}
    try:
        train_library(
            str(Path(root) / "my-base"),
            tasks,
            kind=kind,
            output_dir=Path(root) / output,
            **{"n_clusters": 1, "steps": 5, "progress": False, **TOGETHER, **wanted},
        )
    except TrainingFailed as error:
        failures = error.failures
    report = {
        "seen": SEEN,
        "failures": failures,
        "resumed": [path.name for path in resumed if path is not None],
    }
    (Path(root) / f"report-{os.environ['RANK']}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
