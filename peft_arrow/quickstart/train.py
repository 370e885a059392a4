"""The quickstart's library: its data, the processes that build it, and their errors in one sentence."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..library.library import AdapterLibrary
from .base import smollm2_folder
from .settings import DATA, ERROR_NAME, LIBRARY, PLAN_NAME, WORK, BuildPlan, Trained, TrainSettings
from .tasks import Task


BUILT_NAME, LOG_NAME = "built.json", "launch.log"
# A launch that was told to end is killed after so many seconds.
GRACE = 20
LAUNCH = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_GPU",  # of CPUs here: accelerate starts several processes on a CPU in no other way
    "use_cpu": True,
    "num_machines": 1,
    "mixed_precision": "no",
    "dynamo_backend": "NO",
}


class BuildFailed(RuntimeError):
    """The library could not be built; what is finished stays, and the next run continues there."""


def default_workers() -> int:
    """Two processes of one thread each on a CPU with two cores or more: 1.7 times as fast as one with two threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if torch.accelerator.is_available() else min(2, cores)


def train_experts(
    tasks: Sequence[Task], output: Path, settings: TrainSettings, workers: int | None = None, command: str = ""
) -> Trained:
    """Build the library of clusters' experts in `output`, or what of it is missing or was built in another way.

    Args:
        tasks (`Sequence[Task]`): tasks of `load_tasks()`; their rows are written to `<output>/data/`.
        output (`Path`): the library goes to `library/` in it, and what it is made of to `library-training/`.
        settings (`TrainSettings`): of all experts.
        workers (`int`, *optional*): processes, of one thread each where there are several; default: `default_workers`.
        command (`str`): for the card.

    Raises:
        ValueError: a setting is not allowed.
        BuildFailed: an expert, or a process, failed.
    """
    work = output / WORK
    data = {task.name: write_rows(task, output / DATA, settings.rows) for task in tasks}
    rows = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in data.items()}
    paths = {name: str(path) for name, path in data.items()}
    plan = BuildPlan(settings, paths, rows, str(output / LIBRARY), command)
    if not is_built(plan, output):
        print(settings.told(), file=sys.stderr)
        if settings.base is None:
            smollm2_folder()  # so that the processes do not convert it twice
        (work / BUILT_NAME).unlink(missing_ok=True)
        workers = min(default_workers() if workers is None else workers, len(tasks))
        build_here(plan) if workers == 1 else launch(plan, work, workers)
        work.mkdir(parents=True, exist_ok=True)
        (work / BUILT_NAME).write_text(json.dumps(plan.to_json(), indent=1), encoding="utf-8")
    return read_trained(output)


def write_rows(task: Task, folder: Path, count: int) -> Path:
    """Write the training rows of a task as JSONL with `prompt` and `completion`; the same rows give the same file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task.name}.jsonl"
    rows = ({"prompt": row.prompt, "completion": row.completion} for row in task.train_rows(count))
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def is_built(plan: BuildPlan, output: Path) -> bool:
    """Whether the library in `output` is that of the plan, so that no base has to be loaded to find it finished."""
    try:
        built = BuildPlan.from_json(json.loads((output / WORK / BUILT_NAME).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError, KeyError):
        return False
    same = (built.settings, built.rows) == (plan.settings, plan.rows)
    private = [output / WORK / "private" / task / "adapter_model.safetensors" for task in plan.data]
    return same and (output / LIBRARY / "library.json").exists() and all(path.exists() for path in private)


def read_trained(output: Path) -> Trained:
    """What lies in the folders of a built library."""
    made = AdapterLibrary.from_pretrained(output / LIBRARY).notes.made
    groups = {cluster: list(tasks) for cluster, tasks in made["groups"].items()}
    experts = {cluster: output / LIBRARY / "experts" / cluster for cluster in groups}
    private = {task: output / WORK / "private" / task for tasks in groups.values() for task in tasks}
    records = {cluster: output / WORK / "clusters" / cluster for cluster in groups} | private
    steps = {
        name: json.loads((folder / "training.json").read_text(encoding="utf-8"))["steps"]
        for name, folder in records.items()
    }
    return Trained(output / LIBRARY, experts, private, groups, made["clustering"]["silhouette"], steps)


def build_here(plan: BuildPlan) -> None:
    """Build in this process."""
    from ..training import TrainingFailed
    from .build import build_library

    try:
        build_library(plan)
    except TrainingFailed as error:
        raise BuildFailed(str(error)) from error


def launch(plan: BuildPlan, work: Path, processes: int) -> None:
    """Build in processes that `accelerate launch` starts, each on one thread.

    They end with this process, whatever ends it: they watch a pipe. The progress of the first one is shown; what the
    launcher and the others write goes to a log.
    """
    work.mkdir(parents=True, exist_ok=True)
    (work / ERROR_NAME).unlink(missing_ok=True)
    (work / PLAN_NAME).write_text(json.dumps(plan.to_json()), encoding="utf-8")
    config = work / "accelerate.json"  # of our own, so that the user's is not taken
    config.write_text(json.dumps({**LAUNCH, "num_processes": processes}), encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--main_process_port", "0", "--num_cpu_threads_per_process", "1"]
    command += ["-m", "peft_arrow.quickstart.build", str(work)]
    # The same modules are found as here, and none in the working folder.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}
    print(f"Starting {processes} processes (log: {work / LOG_NAME}) ...", file=sys.stderr)
    with (work / LOG_NAME).open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=2, stderr=log, env=environment, start_new_session=True
        )
        try:
            code = process.wait()
        finally:
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            process.kill()
            process.wait()
    if code != 0:
        raise error_of(work, code)


def error_of(work: Path, code: int) -> Exception:
    """What went wrong in a launch, as an exception with one sentence: what a process left, or how one ended."""
    log = work / LOG_NAME
    ends = map(int, re.findall(r"exitcode\s*:\s*(-\d+)", log.read_text(encoding="utf-8", errors="replace")))
    kills = [-end for end in ends if end != -signal.SIGTERM]  # with SIGTERM the launcher ends the other processes
    if kills:
        memory = ", often a sign of too little memory" if kills[-1] == signal.SIGKILL else ""
        why = f"was killed by signal {kills[-1]}{memory}"
        return BuildFailed(f"a process of the training {why}; the same command continues. The log is {log}.")
    try:
        told = json.loads((work / ERROR_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return BuildFailed(f"the training ended with code {code}; the log is {log}.")
    if told["kind"] in ("ValueError", "TypeError"):
        return ValueError(told["message"])
    kind = "" if told["kind"] == "TrainingFailed" else f"{told['kind']}: "
    return BuildFailed(f"{kind}{told['message']}; the log is {log}.")
