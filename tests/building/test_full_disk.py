"""A full disk, at every place where a build writes: what is finished is kept, and a repeat gives the same library."""

from __future__ import annotations

import errno
import json
import os

import pytest

from peft_arrow import AdapterLibrary, TrainingFailed, train_library
from peft_arrow.cli import main
from peft_arrow.library import folders
from peft_arrow.training import jobs, record
from tests.building.data import QUICK, TASKS, base_in


def build(root, name: str, **options) -> AdapterLibrary:
    quick = {"kind": "mbc", "n_clusters": 2, "steps": 8, "sft_config": QUICK, "progress": False}
    return train_library(str(root / "my-base"), TASKS, output_dir=root / name, **{**quick, **options})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a base and the library of a build that nothing disturbed."""
    root = tmp_path_factory.mktemp("whole")
    base_in(root)
    build(root, "library")
    return root


def weights(root, name: str) -> dict[str, bytes]:
    """The weights of all experts of all stages and of the library, by path."""
    found = [*(root / f"{name}-training").glob("*/[!.]*/*.safetensors"), *(root / name).rglob("*.safetensors")]
    return {str(path.relative_to(root)).replace(name, "x", 1): path.read_bytes() for path in found}


def full(*args, **kwargs):
    """What writing to a full disk raises."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "name", "calls", "failed"),
    [
        (record.TrainingRecord, "write", 1, "task1"),
        (record.TrainingRecord, "write", 5, "cluster_1"),
        (jobs, "write_expert", 0, "task0"),
    ],
    ids=["a private adapter", "an expert of a cluster", "an expert whose steps are done"],
)
def test_an_expert_that_cannot_be_written(where, name, calls, failed, whole, tmp_path, monkeypatch):
    """It is named, and what was half written does not count; with space again the library is that of a good run."""
    (tmp_path / "my-base").symlink_to(whole / "my-base")
    real, count = getattr(where, name), []

    def sometimes(*args, **kwargs):
        count.append(args)
        return full() if len(count) == calls + 1 else real(*args, **kwargs)

    monkeypatch.setattr(where, name, sometimes)
    with pytest.raises(TrainingFailed, match=f"{failed}: OSError: .*No space left") as caught:
        build(tmp_path, "library")
    assert list(caught.value.failures) == [failed]
    stage = tmp_path / "library-training" / ("private" if failed in TASKS else "clusters")
    assert not (stage / failed).exists() and not list(stage.glob(".*draft*"))
    monkeypatch.undo()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "library-training/private").glob("*/training.json")}
    library = build(tmp_path, "library")
    assert "failed" not in library.notes.made and weights(tmp_path, "library") == weights(whole, "library")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept and not list(tmp_path.glob("*/*/.*"))


@pytest.mark.slow
def test_a_library_that_cannot_be_saved(whole, tmp_path, monkeypatch, capsys):
    """The error says where the experts are; saving again trains nothing."""
    (tmp_path / "my-base").symlink_to(whole / "my-base")
    real = folders._take_place
    monkeypatch.setattr(folders, "_take_place", lambda *a: full() if a[1].name == "library" else real(*a))
    with pytest.raises(
        OSError, match="library cannot be saved in .*No space left.*its experts are kept in .*-training"
    ):
        build(tmp_path, "library")
    assert not (tmp_path / "library").exists() and not list(tmp_path.glob(".*draft*"))
    monkeypatch.undo()
    monkeypatch.setattr("peft_arrow.training.jobs.fit", None)
    build(tmp_path, "library")
    assert weights(tmp_path, "library") == weights(whole, "library")


def test_a_small_file_system(whole, tmp_path):
    """Files of at most 9 kB, which adapters are larger than: told by the command in a line a task, exit code 1."""
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    (tmp_path / "tasks").mkdir()
    for task in list(TASKS)[:2]:
        (tmp_path / "tasks" / f"{task}.jsonl").write_text("\n".join(map(json.dumps, TASKS[task])))
    command = ["train", "--base", str(whole / "my-base"), "--data", str(tmp_path / "tasks"), "--steps", "2"]
    command += ["--max-length", "64", "--output", str(tmp_path / "library")]
    usual, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, usual[1]))
    try:
        with pytest.raises(SystemExit, match="2 failed; .*\n  task0: .*\n  task1: "):
            main(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "library").exists()
    assert main(command) == 0 and list(AdapterLibrary.from_pretrained(tmp_path / "library")) == ["task0", "task1"]
