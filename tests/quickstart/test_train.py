"""Training is resumed: complete adapters stay, incomplete and outdated ones are made again."""

from __future__ import annotations

import json

import pytest

from peft_arrow.quickstart.task_list import load_tasks
from peft_arrow.quickstart.train import STAMP, TrainSettings, is_trained, train_adapters


TASKS = load_tasks(["roman", "plural", "spell"])
SETTINGS = TrainSettings(steps=2, rows=16)


class StubTrainer:
    """Writes a file instead of training; fails at the task `breaks`."""

    def __init__(self, breaks=None):
        self.breaks, self.trained = breaks, []

    def __call__(self, task, folder, settings, on_step):
        (folder / "adapter_config.json").write_text("{}")
        for _ in range(settings.steps):
            on_step(1)
        if task.name == self.breaks:
            raise KeyboardInterrupt
        (folder / "adapter_model.safetensors").write_text(task.name)
        self.trained.append(task.name)


def test_trains_all_and_then_nothing(tmp_path):
    first, second = StubTrainer(), StubTrainer()
    folders = train_adapters(TASKS, tmp_path, SETTINGS, workers=1, train=first)
    assert list(folders) == first.trained == ["roman", "plural", "spell"]
    assert json.loads((folders["plural"] / STAMP).read_text())["steps"] == 2
    assert train_adapters(TASKS, tmp_path, SETTINGS, workers=1, train=second) == folders
    assert second.trained == []


def test_continues_after_an_interruption(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_adapters(TASKS, tmp_path, SETTINGS, workers=1, train=StubTrainer(breaks="plural"))
    assert [path.name for path in tmp_path.iterdir()] == ["roman"]
    again = StubTrainer()
    train_adapters(TASKS, tmp_path, SETTINGS, workers=1, train=again)
    assert again.trained == ["plural", "spell"]


def test_other_settings_train_again(tmp_path):
    train_adapters(TASKS, tmp_path, SETTINGS, workers=1, train=StubTrainer())
    again = StubTrainer()
    more = TrainSettings(steps=3, rows=16)
    folders = train_adapters(TASKS[:1], tmp_path, more, workers=1, train=again)
    assert again.trained == ["roman"]
    assert is_trained(folders["roman"], more.fingerprint(TASKS[0]))
    assert not is_trained(folders["roman"], SETTINGS.fingerprint(TASKS[0]))


def test_a_folder_without_a_stamp_is_not_trained(tmp_path):
    (tmp_path / "roman").mkdir()
    assert not is_trained(tmp_path / "roman", SETTINGS.fingerprint(TASKS[0]))
