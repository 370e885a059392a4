"""The file of paged experts: whose it is, what a kill leaves, and what is in private memory."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_arrow import ArrowLoraModel
from peft_arrow.tuner import expert_store
from tests.pico import pico_base


ROOT = Path(__file__).parent.parent.parent
IDS = torch.arange(3, 25).view(2, 11)


def start(folder: Path, where: str) -> subprocess.Popen:
    """A process that pages into the folder."""
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # freed memory goes back to the system at once, so that what is resident is what is held
    settings = {"PYTHONPATH": search, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, str(Path(__file__).with_name("paging_run.py")), str(folder), where]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, **settings}
    )


def killed(folder: Path, where: str) -> None:
    """Kill -9 a process at that point."""
    with start(folder, where) as process:
        while process.stdout.readline().strip() != "stopped":
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("where", ["while copying", "before the name", "in use"])
def test_a_killed_process_leaves_nothing_that_is_used(tmp_path, adapter_folders, where):
    """What it left is removed by the next that pages into the folder; other files and its neighbour's are kept."""
    killed(tmp_path, where)
    (left,) = names(tmp_path)
    assert left.endswith(".safetensors" if where == "in use" else ".safetensors.draft")
    (tmp_path / "notes.txt").write_text("mine")
    other = tmp_path / f"{expert_store.PREFIX}-mine-0123456789abcdef.safetensors"
    other.write_text("mine")
    model = ArrowLoraModel.from_pretrained(pico_base(), adapter_folders, expert_store=tmp_path)
    neighbour = ArrowLoraModel.from_pretrained(pico_base(), adapter_folders, expert_store=tmp_path)
    assert left not in names(tmp_path) and len(names(tmp_path)) == 4
    with torch.no_grad():
        expected = neighbour(input_ids=IDS).logits
        model.unpage_experts()
        assert torch.equal(neighbour(input_ids=IDS).logits, expected)
    neighbour.unpage_experts()
    assert names(tmp_path) == sorted(["notes.txt", other.name]) and other.read_text() == "mine"


def test_the_file_goes_with_its_process(tmp_path):
    with start(tmp_path, "to the end") as process:
        assert process.stdout.readline() and process.wait() == 0
    assert not names(tmp_path)


@pytest.mark.parametrize("suffix", ["", ".draft"])
def test_a_foreign_file_is_never_overwritten(tmp_path, adapter_folders, monkeypatch, suffix):
    token = "0123456789abcdef"
    monkeypatch.setattr(secrets, "token_hex", lambda count: token)
    foreign = tmp_path / f"{expert_store.PREFIX}-default-{token}.safetensors{suffix}"
    foreign.write_text("mine")
    model = ArrowLoraModel.from_pretrained(pico_base(), adapter_folders)
    with pytest.raises(FileExistsError):
        model.page_experts(tmp_path)
    assert names(tmp_path) == [foreign.name] and foreign.read_text() == "mine"
    assert not model.base_model.expert_stores
    with torch.no_grad():
        model(input_ids=IDS)


def test_a_full_disk_changes_nothing(tmp_path, adapter_folders, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    model = ArrowLoraModel.from_pretrained(pico_base(), adapter_folders)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        model.page_experts(tmp_path)
    base = pico_base()
    with pytest.raises(OSError, match="No space left"):
        ArrowLoraModel.from_pretrained(base, adapter_folders, expert_store=tmp_path)
    assert not names(tmp_path) and not any("arrow" in name for name, _ in base.named_parameters())
    model.page_experts("cpu")
    with pytest.raises(OSError, match="No space left"):
        model.unpage_experts() or model.page_experts(tmp_path)


def test_an_adapter_that_cannot_be_read_leaves_no_file(tmp_path, adapter_folders, monkeypatch):
    def broken(*_):
        raise ValueError("damaged")

    monkeypatch.setattr("peft_arrow.tuner.stacking.read_on_base", broken)
    with pytest.raises(ValueError, match="damaged"):
        ArrowLoraModel.from_pretrained(pico_base(), adapter_folders, expert_store=tmp_path)
    assert not names(tmp_path)


def test_a_store_that_is_a_file_is_refused(tmp_path, adapter_folders):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="expert_store=.*is a file"):
        ArrowLoraModel.from_pretrained(pico_base(), adapter_folders, expert_store=tmp_path / "file")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_private_memory_is_given_back(tmp_path):
    """What was in private memory is in the map afterwards."""
    with start(tmp_path, "memory") as process:
        anonymous, in_file, factors = map(int, process.stdout.readline().split())
    assert factors > 50e6
    assert anonymous < -0.9 * factors and in_file > 0.9 * factors
