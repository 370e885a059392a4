"""Several processes of `accelerate launch`: each trains whole experts of its own, or all train each one together."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from accelerate.utils.environment import parse_flag_from_env
from trl import SFTConfig


# One process may wait for another's last expert longer than a collective usually takes.
PATIENCE = timedelta(days=14)
SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


def balanced(names: Sequence[str], loads: Mapping[str, float], parts: int) -> list[list[str]]:
    """Divide names so that the loads of the parts are about equal: the largest first, each to the lightest part.

    Equal loads keep their order and go to the first of the lightest parts, so that every process finds the same
    division. In a part the names are in the order given.
    """
    sums, dealt = [0.0] * parts, {}
    for name in sorted(names, key=lambda name: -loads[name]):
        dealt[name] = sums.index(min(sums))
        sums[dealt[name]] += loads[name]
    return [[name for name in names if dealt[name] == part] for part in range(parts)]


class Processes:
    """The processes of this launch; one where there was no launch.

    `together`: the launch shards the base (FSDP, DeepSpeed), so all processes train each expert together. Otherwise
    the experts are divided and every process trains its own alone, whatever their number, with the same result.
    """

    def __init__(self) -> None:
        in_launch = int(os.environ.get("WORLD_SIZE", 1)) > 1
        options = {"timeout": PATIENCE} if in_launch and not torch.distributed.is_initialized() else {}
        on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        self.state = PartialState(cpu=on_cpu, **options)
        self.count = self.state.num_processes
        self.together = any(parse_flag_from_env(name) for name in SHARDED)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes what all share."""
        return self.state.is_main_process

    @property
    def is_alone_or_main(self) -> bool:
        """Whether this process writes the experts that it trains."""
        return self.is_main or not self.together

    def mine(self, names: Sequence[str], loads: Mapping[str, float] | None = None) -> list[str]:
        """The names that this process works on: each process gets about the same load, by default of 1 a name."""
        if self.together or self.count == 1:
            return list(names)
        return balanced(names, loads or dict.fromkeys(names, 1), self.count)[self.state.process_index]

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes, in their order; waits for all."""
        if self.count == 1:
            return items
        everyone = gather_object(items)
        return items if self.together else everyone

    def from_main(self, item: Any) -> Any:
        """What the main process passed; waits for it."""
        return item if self.count == 1 else broadcast_object_list([item])[0]

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Work as a process without others: trainers made inside neither average gradients nor wait."""
        if self.count == 1 or self.together:
            yield
            return
        world = dict(PartialState._shared_state)
        single = {"distributed_type": DistributedType.NO, "num_processes": 1, "process_index": 0, "backend": None}
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._shared_state.update({**world, **single, "local_process_index": 0})
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            PartialState._shared_state.update(world)

    def localised(self, arguments: SFTConfig) -> SFTConfig:
        """The arguments for a trainer inside `alone`: this process's own device, and no others."""
        if self.count == 1 or self.together:
            return arguments
        local = copy.copy(arguments)
        local.distributed_state = PartialState()
        local.__dict__["_setup_devices"] = local.distributed_state.device
        local._n_gpu = 0 if local.distributed_state.device.type == "cpu" else 1
        return local
