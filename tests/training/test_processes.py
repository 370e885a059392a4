"""What a process of a launch shows to a trainer; accelerate's state of machines with GPUs is written by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers.training_args import ParallelMode
from trl import SFTConfig

from peft_arrow.training.processes import Processes
from tests.processes import environment, free_port


@pytest.fixture
def arguments(tmp_path) -> SFTConfig:
    return SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
    )


@pytest.fixture
def second_of_two(arguments):
    """The second of two processes on a machine with two GPUs, as `PartialState` and `SFTConfig` are there."""
    AcceleratorState._reset_state(reset_partial_state=True)
    state = {
        "_cpu": False,
        "backend": "nccl",
        "device": torch.device("cuda:1"),
        "debug": False,
        "distributed_type": DistributedType.MULTI_GPU,
        "num_processes": 2,
        "process_index": 1,
        "local_process_index": 1,
        "fork_launched": False,
    }
    PartialState._shared_state.update(state)
    arguments.distributed_state = PartialState()
    arguments.__dict__["_setup_devices"], arguments._n_gpu = torch.device("cuda:1"), 1
    yield processes_of(2)
    AcceleratorState._reset_state(reset_partial_state=True)


def processes_of(count: int, together: bool = False) -> Processes:
    """Without the groups that a launch of so many would have."""
    processes = object.__new__(Processes)
    processes.count, processes.together, processes.state = count, together, PartialState()
    return processes


def test_a_process_trains_alone_on_its_own_gpu(second_of_two, arguments):
    before = dict(PartialState._shared_state)
    assert not second_of_two.is_main
    with second_of_two.alone():
        local = second_of_two.localised(arguments)
        state = PartialState()
        assert (state.num_processes, state.process_index, state.is_main_process) == (1, 0, True)
        assert (state.distributed_type, state.device) == (DistributedType.NO, torch.device("cuda:1"))
        assert (local.device, local.n_gpu, local.world_size) == (torch.device("cuda:1"), 1, 1)
        assert local.parallel_mode == ParallelMode.NOT_PARALLEL and local.should_save
        assert (local.per_device_train_batch_size, local.gradient_accumulation_steps) == (4, 4)
    assert dict(PartialState._shared_state) == before
    assert (arguments.world_size, arguments.parallel_mode) == (2, ParallelMode.DISTRIBUTED)


def test_the_state_is_put_back_after_a_failure(second_of_two):
    before = dict(PartialState._shared_state)
    with pytest.raises(ValueError), second_of_two.alone():
        raise ValueError
    assert dict(PartialState._shared_state) == before


def test_without_a_launch_one_gpu_of_several_is_used(arguments):
    """The trainer's own DataParallel would take a step's rows once on each."""
    arguments._n_gpu = 4
    assert processes_of(1).localised(arguments).n_gpu == 1
    assert arguments.n_gpu == 4


@pytest.mark.parametrize(
    ("count", "size", "passes", "share"),
    [(2, 4, 4, (4, 2)), (4, 4, 4, (4, 1)), (8, 4, 4, (2, 1)), (2, 2, 1, (1, 1)), (3, 1, 6, (1, 2)), (6, 3, 4, (1, 2))],
)
def test_processes_that_train_together_divide_the_rows_of_a_step(count, size, passes, share, arguments):
    arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = size, passes
    local = processes_of(count, together=True).localised(arguments)
    assert (local.per_device_train_batch_size, local.gradient_accumulation_steps) == share
    assert share[0] * share[1] * count == size * passes
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (size, passes)


def test_rows_that_cannot_be_divided_are_refused(arguments):
    told = "per_device_train_batch_size=4 times gradient_accumulation_steps=4 rows a step cannot be divided over the 3"
    with pytest.raises(ValueError, match=told):
        processes_of(3, together=True).share_of_step(arguments)


# What is registered first runs last: after the handlers of the package.
ENDING = """
import atexit
import torch
atexit.register(lambda: print("left" if not torch.distributed.is_initialized() else "still in the group"))
from peft_arrow.training.processes import Processes
processes = Processes()
print(processes.gather([processes.state.process_index]), flush=True)
{last}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("last", "code"),
    [("", 0), ("torch.distributed.destroy_process_group()", 0), ("raise SystemExit(3)", 3)],
    ids=["gathered", "destroyed by the script", "failed"],
)
def test_a_process_leaves_its_groups_before_it_ends(last, code):
    """With groups left to the end of the interpreter, one of five such launches aborts."""
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common = {**environment(), **launched, "ACCELERATE_USE_CPU": "true"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ENDING.format(last=last)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=120)[0].splitlines() for process in started]
    assert [process.returncode for process in started] == [code, code]
    assert printed == [["[0, 1]", "left"]] * 2
