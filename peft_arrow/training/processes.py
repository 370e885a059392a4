"""Several processes of `accelerate launch`: each trains whole experts of its own, or all train each one together."""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import accelerate
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.environment import parse_flag_from_env
from packaging.version import Version
from trl import SFTConfig


# One process may wait for another's last expert longer than a collective usually takes.
PATIENCE = timedelta(days=14)
# Processes that train together come to the end of an expert within the time that one of them takes to write it.
FOLLOW = timedelta(minutes=5)
# Measured: with 1.10 to 1.14 a sharded training that goes on from a checkpoint ends with other weights.
CONTINUES_SHARDED = Version("1.15.0")
SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


@functools.cache
def _group(world: Any, timeout: timedelta) -> Any:
    """A group for what processes tell each other, on CPUs, whatever backend and timeout `world` was made with."""
    group = torch.distributed.new_group(backend="gloo", timeout=timeout)
    atexit.register(_leave, world, group)
    return group


def _leave(world: Any, group: Any) -> None:
    """Destroy a group, and a `world` of CPUs with it, unless that was done before the process ended.

    A process that ends with them may abort after its work, because threads of gloo drop tensors that belong to Python
    when there is no Python any more: one of five launches of two processes that gathered and ended, with torch 2.13.
    """
    if torch.distributed.is_initialized() and torch.distributed.group.WORLD is world:
        torch.distributed.destroy_process_group(None if torch.distributed.get_backend() == "gloo" else group)


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
        on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        self.state = PartialState(cpu=on_cpu)
        self.count = self.state.num_processes
        self.together = any(parse_flag_from_env(name) for name in SHARDED)
        groups = [_group(torch.distributed.group.WORLD, limit) for limit in (PATIENCE, FOLLOW) if self.count > 1]
        self._patient, self._prompt = groups or (None, None)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes what all share."""
        return self.state.is_main_process

    @property
    def can_continue(self) -> bool:
        """Whether a training can go on from a checkpoint and end with the weights of an undisturbed one."""
        return not self.together or Version(accelerate.__version__) >= CONTINUES_SHARDED

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
        everyone: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(everyone, items, group=self._patient)
        return items if self.together else [item for part in everyone for item in part]

    def from_main(self, item: Any) -> Any:
        """What the main process passed; waits for it."""
        if self.count == 1:
            return item
        told = [item]
        torch.distributed.broadcast_object_list(told, src=0, group=self._patient)
        return told[0]

    def agreed(self, reason: str | None) -> str | None:
        """Why an expert failed, the same on all processes that train it together; each tells its own reason or None.

        Raises:
            RuntimeError: others did not come to the expert's end in time, because they wait inside the trainer for
                this one; the launcher ends them when this process ends.
        """
        if self.count == 1 or not self.together:
            return reason
        everyone: list[Any] = [None] * self.count
        try:
            torch.distributed.all_gather_object(everyone, reason, group=self._prompt)
        except RuntimeError as error:
            told = f"failed ({reason})" if reason else "finished"
            raise RuntimeError(
                f"process {self.state.process_index} {told}, and another one did not within {FOLLOW}; all are ended, "
                "and a restart trains what is missing."
            ) from error
        return next((told for told in everyone if told is not None), None)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Train as a process without others: trainers made inside neither average gradients nor wait.

        Processes that train together stay together. In both cases accelerate's state is as before afterwards, so that
        every expert meets the same one: a trainer leaves its FSDP or DeepSpeed plugin in it.
        """
        if self.count == 1 and not self.together:
            yield
            return
        world = dict(PartialState._shared_state)
        single = {"distributed_type": DistributedType.NO, "num_processes": 1, "process_index": 0, "backend": None}
        inside = {} if self.together else {**single, "local_process_index": 0}
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._shared_state.update({**world, **inside})
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            PartialState._shared_state.update(world)

    def localised(self, arguments: SFTConfig) -> SFTConfig:
        """The arguments for a trainer inside `alone`: this process's own device and no others, or its share of a step.

        Raises:
            ValueError: the rows of a step cannot be divided; see `share_of_step`.
        """
        local = copy.copy(arguments)
        if self.together:
            local.per_device_train_batch_size, local.gradient_accumulation_steps = self.share_of_step(arguments)
        elif self.count > 1:
            local.distributed_state = PartialState()
            local.__dict__["_setup_devices"] = local.distributed_state.device
            local._n_gpu = 0 if local.distributed_state.device.type == "cpu" else 1
        else:
            local._n_gpu = min(arguments.n_gpu, 1)  # without a launch the trainer would spread a step over all GPUs
        return local

    def share_of_step(self, arguments: SFTConfig) -> tuple[int, int]:
        """The batch size and accumulation of one of the processes that train together: a step keeps its rows.

        Fewer accumulations come first, because their batches are those of one process.

        Raises:
            ValueError: the number of processes does not divide the rows of a step in this way.
        """
        size, passes = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
        fewer = math.gcd(passes, self.count)
        smaller = self.count // fewer
        if size % smaller:
            raise ValueError(
                f"per_device_train_batch_size={size} times gradient_accumulation_steps={passes} rows a step cannot be "
                f"divided over the {self.count} processes that train each expert together; choose a "
                f"gradient_accumulation_steps that is a multiple of {self.count}."
            )
        return size // smaller, passes // fewer
