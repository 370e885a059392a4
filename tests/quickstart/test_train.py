"""Building the quickstart's library on a pico base: resumed, trained again where something changed, short errors."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from peft_arrow import AdapterLibrary
from peft_arrow.quickstart import BuildFailed, TrainSettings
from peft_arrow.quickstart import train as quickstart_train
from peft_arrow.quickstart.settings import BuildPlan
from peft_arrow.quickstart.task_list import load_tasks
from peft_arrow.quickstart.train import error_of, is_built, read_trained, train_experts, write_rows
from tests.building.data import base_in
from tests.processes import environment


TASKS = load_tasks(["roman", "plural", "spell"])


@pytest.fixture
def settings(tmp_path) -> TrainSettings:
    """Few steps on a pico base; its tokens are characters, and the rows of these tasks are short enough."""
    return TrainSettings(base=base_in(tmp_path), steps=5, rows=16, rank=2, clusters=2)


def trained_at(output: Path) -> dict[str, int]:
    """When each expert was finished."""
    work = output / "library-training"
    return {
        f"{path.parent.parent.name}/{path.parent.name}": path.stat().st_mtime_ns
        for path in work.glob("*/*/training.json")
    }


def test_builds_a_library_and_then_nothing(settings, tmp_path, monkeypatch, capsys):
    trained = train_experts(TASKS, tmp_path / "out", settings, workers=1, command="peft-arrow quickstart")
    assert sorted(task for group in trained.groups.values() for task in group) == ["plural", "roman", "spell"]
    assert list(trained.experts) == list(trained.groups) == ["cluster_0", "cluster_1"]
    assert all(trained.steps[task] == 2 for task in trained.private)
    assert {cluster: trained.steps[cluster] for cluster in trained.groups} == {
        cluster: 3 * len(tasks) for cluster, tasks in trained.groups.items()
    }
    assert all(task in trained.groups[trained.cluster_of(task)] for task in trained.private)
    library = AdapterLibrary.from_pretrained(trained.library)
    assert library.base_model_name_or_path == settings.base and library["cluster_0"].config["r"] == 2
    made = library.notes.made
    assert made["command"] == "peft-arrow quickstart" and made["recipe"]["max_grad_norm"] == 1.0
    record = json.loads((trained.private["roman"] / "training.json").read_text())
    assert record["identity"]["sft.warmup_steps"] == 0 and record["identity"]["lora.target_modules"] == "all-linear"
    assert "rank 2, alpha 16" in capsys.readouterr().err
    monkeypatch.setattr(quickstart_train, "build_here", None)
    assert train_experts(TASKS, tmp_path / "out", settings, workers=1) == trained == read_trained(tmp_path / "out")
    assert capsys.readouterr().err == ""


def test_only_what_changed_is_trained_again(settings, tmp_path):
    """Fewer clusters leave the private adapters; fewer tasks leave theirs; more steps change all."""
    output = tmp_path / "out"
    train_experts(TASKS, output, settings, workers=1)
    first = trained_at(output)
    one = train_experts(TASKS, output, replace(settings, clusters=1), workers=1)
    assert list(one.groups) == ["cluster_0"] and list(AdapterLibrary.from_pretrained(one.library)) == ["cluster_0"]
    now = trained_at(output)
    private = {name for name in first if name.startswith("private/")}
    assert len(private) == 3 and {name for name in first if now[name] == first[name]} >= private
    fewer = train_experts(TASKS[:1], output, replace(settings, clusters=1), workers=1)
    assert fewer.groups == {"cluster_0": ["roman"]} and trained_at(output)["private/roman"] == first["private/roman"]
    train_experts(TASKS[:1], output, replace(settings, clusters=1, steps=7), workers=1)
    assert trained_at(output)["private/roman"] != first["private/roman"]


def test_what_is_missing_is_seen(settings, tmp_path):
    output = tmp_path / "out"
    trained = train_experts(TASKS[:1], output, replace(settings, clusters=1), workers=1)
    plan = BuildPlan.from_json(json.loads((output / "library-training/built.json").read_text()))
    assert is_built(plan, output) and not is_built(plan, tmp_path)
    assert not is_built(replace(plan, rows={"roman": "other"}), output)
    assert not is_built(replace(plan, settings=settings), output)
    (trained.private["roman"] / "adapter_model.safetensors").unlink()
    assert not is_built(plan, output)


def test_a_failing_task_is_named(settings, tmp_path, monkeypatch):
    real = sys.modules["peft_arrow.training.jobs"].fit

    def fit(model, tokenizer, dataset, arguments, **options):
        if "plural" in arguments.output_dir:
            raise RuntimeError("out of memory")
        return real(model, tokenizer, dataset, arguments, **options)

    monkeypatch.setattr("peft_arrow.training.jobs.fit", fit)
    with pytest.raises(BuildFailed, match="1 experts failed and 2 are in .*plural: RuntimeError: out of memory"):
        train_experts(TASKS, tmp_path / "out", settings, workers=1)
    monkeypatch.undo()
    assert len(train_experts(TASKS, tmp_path / "out", settings, workers=1).private) == 3


def test_rows_are_jsonl(tmp_path):
    path = write_rows(TASKS[0], tmp_path, 4)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [set(row) for row in rows] == [{"prompt", "completion"}] * 4 and path.name == "roman.jsonl"


LOG = "Other Failures:\n  exitcode  : {} (pid: 1)\nRoot Cause (first observed failure):\n  exitcode  : {} (pid: 2)\n"


@pytest.mark.parametrize(
    ("left", "log", "kind", "told"),
    [
        ({"kind": "ValueError", "message": "steps=1 is not"}, LOG.format(1, 1), ValueError, "^steps=1 is not$"),
        ({"kind": "TrainingFailed", "message": "1 experts failed"}, "", BuildFailed, "^1 experts failed; the log is"),
        ({"kind": "OSError", "message": "disk full"}, LOG.format(-15, 1), BuildFailed, "^OSError: disk full; the log"),
        (
            {"kind": "RuntimeError", "message": "peer"},
            LOG.format(1, -9),
            BuildFailed,
            "signal 9, often .* memory; the",
        ),
        (None, LOG.format(-15, -11), BuildFailed, "killed by signal 11; the same command continues"),
        (None, "no such module", BuildFailed, "^the training ended with code 1; the log is .*launch.log"),
    ],
)
def test_errors_of_a_launch_are_one_sentence(left, log, kind, told, tmp_path):
    (tmp_path / "launch.log").write_text(log)
    if left is not None:
        (tmp_path / "error.json").write_text(json.dumps(left))
    with pytest.raises(kind, match=told):
        raise error_of(tmp_path, 1)


SCRIPT = """
import sys
from pathlib import Path
from peft_arrow.quickstart import TrainSettings
from peft_arrow.quickstart.task_list import load_tasks
from peft_arrow.quickstart.train import train_experts
settings = TrainSettings(base=sys.argv[1], steps=int(sys.argv[3]), rows=16, rank=2, clusters=2)
train_experts(load_tasks(["roman", "plural", "clock"]), Path(sys.argv[2]), settings, workers=2)
"""


@pytest.fixture
def base_folder(tmp_path) -> str:
    return base_in(tmp_path)


def start(base: str, output: Path, steps: int) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, base, str(output), str(steps)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def processes_of(output: Path) -> list[str]:
    """The processes that work on a folder, by their arguments."""
    found = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if _is_readable(path)]
    return [line.replace(b"\0", b" ").decode() for line in found if str(output).encode() in line]


def _is_readable(path: Path) -> bool:
    try:
        return bool(path.read_bytes())
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_processes_end_and_the_next_run_continues(number, base_folder, tmp_path):
    output = tmp_path / "out"
    process = start(base_folder, output, 120)
    until = time.monotonic() + 200
    while not trained_at(output) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    assert process.poll() is None, process.stdout.read()
    process.send_signal(number)
    process.communicate(timeout=60)  # until no process holds the pipe any more
    while processes_of(output) and time.monotonic() < until:
        time.sleep(0.1)
    assert not processes_of(output)
    before = trained_at(output)
    if number == signal.SIGINT:
        return  # what follows is the same
    again = start(base_folder, output, 120)
    printed, _ = again.communicate(timeout=300)
    assert again.returncode == 0, printed
    now = trained_at(output)
    assert before and {name: now[name] for name in before} == before
    assert "experts are there already" in printed and len(read_trained(output).private) == 3


@pytest.mark.slow
def test_an_error_in_a_launch_is_short(base_folder, tmp_path):
    process = start(base_folder, tmp_path / "out", 1)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    assert printed.splitlines()[-1].startswith("ValueError: steps=1 is not allowed")
    assert "torch.distributed" not in printed
