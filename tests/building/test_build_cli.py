"""`peft-arrow train` and `build`: what is printed, the YAML file, exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from peft_arrow import AdapterLibrary
from peft_arrow.cli import main
from tests.building.data import TASKS, base_in


QUICKLY = ["--base", "my-base", "--data", "tasks", "--steps", "5", "--batch-size", "2", "--max-length", "64"]


@pytest.fixture
def reader(tmp_path, monkeypatch) -> Path:
    """A folder with a base and four tasks, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    base_in(tmp_path)
    (tmp_path / "tasks").mkdir()
    for task, rows in TASKS.items():
        (tmp_path / "tasks" / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_train(reader, capsys):
    assert main(["train", *QUICKLY, "--rank", "2", "--lr", "0.01", "--seed", "3", "--output", "library"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["stage private: 4 experts, 20 steps, 320 tokens", "4 experts for my-base are in library."]
    library = AdapterLibrary.from_pretrained("library")
    assert list(library) == list(TASKS) and library["task0"].config["r"] == 2
    made = library.notes.made
    assert made["seeds"] == {"init": 3, "training": 3, "partition": 3} and made["recipe"]["learning_rate"] == 0.01
    assert made["command"] == (
        "peft-arrow train --base my-base --data tasks --output library --steps 5 --rank 2 --lr 0.01 --batch-size 2 "
        "--max-length 64 --seed 3"
    )


def test_build_with_a_config(reader, capsys):
    """What is on the command line wins; the report is JSON alone; the same command again trains nothing."""
    (reader / "build.yaml").write_text(
        "base: my-base\ndata: [tasks/task0.jsonl, tasks/task1.jsonl]\nkind: random\nclusters: 1\nsteps: 9\nlr: 1e-2\n"
        "max-length: 64\nsft_config: {per_device_train_batch_size: 2, gradient_accumulation_steps: 1}\n"
        "lora_config: {lora_dropout: 0.0}\n"
    )
    command = ["build", "--config", "build.yaml", "--clusters", "2", "--steps", "4", "--output", "library", "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["experts"] == ["cluster_0", "cluster_1"] and report["failed"] == {} and report["pushed"] is None
    assert report["made"]["stages"] == [{"stage": "clusters", "experts": 2, "steps": 8, "tokens": 128}]
    assert report["made"]["recipe"]["learning_rate"] == 0.01 and report["made"]["recipe"]["lora_dropout"] == 0.0
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out) == report


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("base: x\nclustres: 3\n", "config 'build.yaml' holds 'clustres', which is unknown; allowed are"),
        ("steps: many\n", "config 'build.yaml': argument --steps: 'many' is not a whole number"),
        ("kind: [a\n", "config 'build.yaml' is not YAML"),
        ("- a\n", "holds no mapping"),
        ("sft_config: 3\n", "sft_config must be a mapping"),
        ("config: other.yaml\n", "holds 'config', which is unknown"),
        ("kind: mbc\n", "--base is missing"),
    ],
)
def test_bad_configs(text, told, reader, capsys):
    (reader / "build.yaml").write_text(text)
    assert main(["build", "--config", "build.yaml"]) == 2
    assert told in capsys.readouterr().err


ROW = {"prompt": "a:", "completion": " aaa"}


@pytest.mark.parametrize(
    ("rows", "more", "told"),
    [
        ("", (), "dataset 'bad' is empty: 'data/bad.jsonl' has no rows."),
        ("{nonsense", (), "dataset 'bad': 'data/bad.jsonl' cannot be read"),
        ({"prompt": "a"}, (), "dataset 'bad' has no column 'completion'"),
        ({"prompt": "a", "completion": ""}, (), "column 'completion' of row 0 is empty, so there is nothing to learn"),
        ({"prompt": "a", "completion": "b" * 70}, (), "completion of row 0 has 71 tokens, and max_length is 64"),
        ({"text": "a"}, (), "datasets are of different kinds: 'bad' (text) and 'good' (prompt and completion)"),
        (ROW, ("--clusters", "auto"), "n_clusters='auto' is not allowed for 2 tasks; it needs at least 3"),
        (ROW, ("--clusters", "3"), "n_clusters=3 is not allowed for 2 tasks"),
        (ROW, ("--steps", "1"), "steps=1 is not allowed; a task needs at least 2"),
        (ROW, ("--base", "./nowhere"), "base='./nowhere' cannot be loaded: there is no such folder."),
        (ROW, ("--base", "no/where"), "base='no/where' cannot be loaded as a folder or from the Hub"),
        (ROW, ("--base", "data"), "base='data' cannot be loaded as a folder or from the Hub"),
        (ROW, ("--base-revision", "v1"), "revision='v1' is for a base on the Hub; base='my-base' is a folder."),
        (ROW, ("--data", "./nowhere"), "dataset 'nowhere': there is no file or folder 'nowhere'."),
        (ROW, ("--private",), "--private is for --push."),
        (ROW, ("--out", "data"), "output_dir='data' holds something else than a library"),
    ],
)
def test_bad_input_is_told_in_a_line_before_the_training(rows, more, told, reader, capsys, monkeypatch):
    """A bad file among good ones, and arguments that cannot be: exit code 2."""
    monkeypatch.setattr("peft_arrow.training.jobs.fit", None)
    (reader / "data").mkdir()
    (reader / "data/good.jsonl").write_text(json.dumps(ROW) + "\n")
    (reader / "data/bad.jsonl").write_text(rows if isinstance(rows, str) else json.dumps(rows) + "\n")
    command = ["build", *QUICKLY, "--data", "data", "--clusters", "2", "--output", "library"]
    assert main([*command, *more]) == 2
    error = capsys.readouterr().err
    assert f"peft-arrow build: {told}" in error or told in error.splitlines()[-1]
    assert "Traceback" not in error and not (reader / "library-training").exists()


def test_a_base_without_weights_is_told_once(reader, capsys):
    (reader / "my-base/model.safetensors").unlink()
    assert main(["train", *QUICKLY, "--output", "library"]) == 2
    assert capsys.readouterr().err.count("base='my-base' cannot be loaded") == 1


def test_other_names_and_files(reader):
    """`--out` is `--output`, in YAML too; hidden files are no tasks; a saved data set is one; one step is enough."""
    (reader / "tasks/._task0.jsonl").write_bytes(b"\0\1")
    (reader / "build.yaml").write_text(
        "base: my-base\ndata: tasks\nkind: shared\nout: library\nsteps: 1\ndtype: float32\n"
    )
    assert main(["build", "--config", "build.yaml", "--max-length", "64"]) == 0
    made = AdapterLibrary.from_pretrained("library").notes.made
    assert made["groups"] == {"shared": list(TASKS)} and made["base_dtype"] == "float32"
    Dataset.from_list(TASKS["task0"]).save_to_disk("saved")
    assert main(["train", *QUICKLY, "--data", "saved", "--out", "one"]) == 0
    assert list(AdapterLibrary.from_pretrained("one")) == ["saved"]


def test_exit_codes(reader, capsys, monkeypatch):
    assert main(["build", *QUICKLY, "--clusters", "9", "--output", "library"]) == 2
    assert "n_clusters=9 is not allowed for 4 tasks" in capsys.readouterr().err
    assert main(["build", *QUICKLY, "--output", "library", "--push", "me/library"]) == 2
    assert "is a folder of this machine" in capsys.readouterr().err
    assert main(["build", "--config", "nowhere.yaml"]) == 1
    real = sys.modules["peft_arrow.training.jobs"].fit

    def fit(model, tokenizer, dataset, arguments, **options):
        if "task2" in arguments.output_dir:
            raise OSError(28, "No space left on device")
        return real(model, tokenizer, dataset, arguments, **options)

    monkeypatch.setattr("peft_arrow.training.jobs.fit", fit)
    with pytest.raises(SystemExit, match="task2: OSError: .*No space left"):
        main(["train", *QUICKLY, "--output", "library"])
    assert "3 experts for my-base are in library." in capsys.readouterr().out
