"""Builds that are killed at several moments, and builds by two processes: the library of an undisturbed run."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_arrow import AdapterLibrary
from tests.building import data
from tests.building.data import base_in
from tests.processes import environment, free_port


def start(
    root: Path, output: str, log: Path, launcher: tuple[str, ...] = (), sizes: tuple[str, ...] = (), **more: str
) -> subprocess.Popen:
    words = [sys.executable, *launcher, str(Path(data.__file__)), str(root), output, "mbc", *sizes]
    with log.open("a") as file:
        return subprocess.Popen(words, env={**environment(), **more}, stdout=file, stderr=file, start_new_session=True)


def finish(process: subprocess.Popen, log: Path) -> None:
    assert process.wait(timeout=240) == 0, log.read_text()[-4000:]


def launcher(root: Path, processes: int = 2) -> tuple[str, ...]:
    config = {"compute_environment": "LOCAL_MACHINE", "use_cpu": True, "num_machines": 1, "mixed_precision": "no"}
    path = root / "launch.json"
    path.write_text(json.dumps({**config, "num_processes": processes, "distributed_type": "MULTI_GPU"}))
    return ("-m", "accelerate.commands.launch", "--config_file", str(path), "--main_process_port", str(free_port()))


def finished(work: Path) -> dict[str, tuple[str, int]]:
    """Of each finished expert the sha256 of its weights and the time of its record: a second training changes it."""
    return {
        str(record.parent.relative_to(work)): (
            hashlib.sha256((record.parent / "adapter_model.safetensors").read_bytes()).hexdigest(),
            record.stat().st_mtime_ns,
        )
        for record in work.glob("*/[!.]*/training.json")
    }


def same(one: Path, other: Path) -> None:
    """Both libraries have the same files but for what the card says of folders."""
    first, second = (AdapterLibrary.from_pretrained(folder) for folder in (one, other))
    assert list(first) == list(second) and first.notes == second.notes
    for name in first:
        path = f"experts/{name}/adapter_model.safetensors"
        assert (one / path).read_bytes() == (other / path).read_bytes(), name
    assert (one / "library.json").read_bytes() == (other / "library.json").read_bytes()


def wait_until(moment, process: subprocess.Popen, started: float) -> None:
    while not moment(started) and process.poll() is None and time.monotonic() < started + 120:
        time.sleep(0.005)


def moments_of(work: Path, draw: random.Random) -> list[Callable[[float], bool]]:
    """When a run is killed, one moment a run: three in each stage, one between them, and one at the very end."""
    library = work.parent / work.name.removesuffix("-training")

    def some(pattern: str, count: int = 1) -> bool:
        return len(list(work.glob(pattern))) >= count

    def later(moment: Callable[[], bool], most: float) -> Callable[[float], bool]:
        """At a drawn time after the first sight of something."""
        wait, seen = draw.uniform(0, most), []

        def reached(started: float) -> bool:
            if not seen and moment():
                seen.append(time.monotonic())
            return bool(seen) and time.monotonic() > seen[0] + wait

        return reached

    return [
        later(lambda: some("private/.*.checkpoints"), 0.5),
        later(lambda: some("private/*/training.json"), 0.3),
        later(lambda: some("private/.*.checkpoints/checkpoint-*"), 0.1),
        later(lambda: some("private/*/training.json", 3), 0.5),
        later(lambda: some("private/*/training.json", 4), 0.1),
        later(lambda: some("clusters/.*.checkpoints"), 0.3),
        later(lambda: some("clusters/.*.checkpoints/checkpoint-*"), 0.1),
        later(lambda: some("clusters/*/training.json"), 0.4),
        later(lambda: some("clusters/*/training.json", 2) or library.exists(), 0.02),
    ]


@pytest.mark.slow
def test_killed_builds_give_the_same_library(tmp_path):
    """Killed nine times, at drawn moments of both stages, between them and while saving; then run to the end.

    An expert that is finished is never trained again: neither its weights nor the time of its record change.
    """
    base_in(tmp_path)
    undisturbed = start(tmp_path, "whole", tmp_path / "whole.log")
    finish(undisturbed, tmp_path / "whole.log")
    work, log = tmp_path / "killed-training", tmp_path / "killed.log"
    kept: dict[str, tuple[str, int]] = {}
    kills = []
    for moment in moments_of(work, random.Random(0)):
        process = start(tmp_path, "killed", log)
        wait_until(moment, process, time.monotonic())
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        kills.append(process.wait() == -signal.SIGKILL)
        now = finished(work)
        assert {name: now[name] for name in kept} == kept, "no expert is trained twice"
        kept = now
    finish(start(tmp_path, "killed", log), log)
    assert sum(kills) >= 8 and len(kept) >= 5
    assert {name: finished(work)[name] for name in kept} == kept
    assert not list(work.glob("*/.*")), "neither checkpoints nor drafts are left"
    one, other = (finished(folder) for folder in (tmp_path / "whole-training", work))
    assert {name: sha for name, (sha, _) in one.items()} == {name: sha for name, (sha, _) in other.items()}
    same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "sizes"), [(2, ("4", "2")), (3, ("2", "1"))], ids=["all-work", "some-have-nothing-to-do"]
)
def test_several_processes_give_the_library_of_one(processes, sizes, tmp_path):
    base_in(tmp_path)
    one, many = tmp_path / "one.log", tmp_path / "many.log"
    finish(start(tmp_path, "one", one, sizes=sizes), one)
    finish(start(tmp_path, "many", many, launcher(tmp_path, processes), sizes), many)
    same(tmp_path / "one", tmp_path / "many")


@pytest.mark.slow
def test_a_process_that_dies_is_told_and_its_tasks_are_trained_on_restart(tmp_path):
    """The second of two processes kills itself when it starts an expert; the launcher says so."""
    base_in(tmp_path)
    work, log = tmp_path / "library-training", tmp_path / "log"
    process = start(tmp_path, "library", log, launcher(tmp_path), FAULT="kill", FAULT_IN_RANK="1")
    assert process.wait(timeout=240) != 0
    assert "SIGKILL" in log.read_text() or "exitcode  : -9" in log.read_text()
    before = finished(work)
    assert len(before) < 4 and not (tmp_path / "library").exists()
    finish(start(tmp_path, "library", log, launcher(tmp_path)), log)
    assert {name: finished(work)[name] for name in before} == before
    assert len(AdapterLibrary.from_pretrained(tmp_path / "library")) == 2


@pytest.mark.slow
def test_a_fault_of_the_program_in_one_process_ends_the_launch(tmp_path):
    """The other process trains, or waits for this one, which would last for days."""
    base_in(tmp_path)
    log = tmp_path / "log"
    process = start(tmp_path, "library", log, launcher(tmp_path), FAULT="crash", FAULT_IN_RANK="1")
    assert process.wait(timeout=120) != 0
    assert "Crash: a fault of the program" in log.read_text()
    assert not (tmp_path / "library").exists()


@pytest.mark.slow
def test_ctrl_c_ends_all_processes(tmp_path):
    """One trains and the other waits for it."""
    base_in(tmp_path)
    log, private = tmp_path / "log", tmp_path / "library-training/private"
    process = start(tmp_path, "library", log, launcher(tmp_path), FAULT="slow", FAULT_IN_RANK="1")
    wait_until(
        lambda started: "trains as" in log.read_text() and len(list(private.glob("[!.]*/training.json"))) == 2,
        process,
        time.monotonic(),
    )
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) != 0
    trains = int(log.read_text().partition("trains as ")[2].split()[0])
    with pytest.raises(ProcessLookupError):
        os.kill(trains, 0)
