"""`peft-arrow evaluate` on files."""

from __future__ import annotations

import json

import pytest

from peft_arrow.cli import main
from peft_arrow.cli.evaluate import method_of
from tests.evaluation.made import random_library, random_rows, two_tasks
from tests.pico import pico_base


pytest.importorskip("matplotlib")


@pytest.fixture
def folder(tmp_path, tokenizer, monkeypatch):
    """A base, a library and two tasks in files; the current folder."""
    pico_base().save_pretrained(tmp_path / "my-base")
    tokenizer.save_pretrained(tmp_path / "my-base")
    monkeypatch.chdir(tmp_path)
    random_library(tmp_path / "adapters").save_pretrained(tmp_path / "library")
    (tmp_path / "tasks").mkdir()
    for name, rows in two_tasks().items():
        (tmp_path / f"tasks/{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


QUICK = ["--seeds", "2", "--no-generate", "--rows", "4"]


def test_evaluate(folder, capsys):
    command = ["evaluate", "library", "--tasks", "tasks", "--methods", "arrow:top_k=1,name=one", "--output", "judged"]
    assert main([*command, *QUICK]) == 0
    text = capsys.readouterr().out
    assert "What to look at" in text and "\none " in text and "8 judged rows of 2 tasks" in text
    assert {path.name for path in (folder / "judged").iterdir()} == {
        "results",
        "judged.json",
        "report.json",
        "report.md",
        "report.png",
    }
    assert main([*command, *QUICK, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["libraries"][""]["methods"])[-1] == "oracle" and found["what_to_look_at"]


def test_fitted_routers_and_several_libraries(folder, capsys):
    (folder / "fit").mkdir()
    for name in "abc":
        (folder / f"fit/{name}.jsonl").write_text("\n".join(map(json.dumps, random_rows(name, "train", 2, 0))))
    command = ["evaluate", "library", "--tasks", "tasks/a.jsonl", "--methods", "centroid", "--output", "out", *QUICK]
    assert main(command) == 2
    assert "fit_data is missing" in capsys.readouterr().err  # expert c has no task, so no rows for training
    assert main([*command, "--fit-data", "fit"]) == 0
    (folder / "library").rename(folder / "big")
    random_library(folder / "two", ("a", "b")).save_pretrained(folder / "small")
    command = ["evaluate", "big", "small", "--tasks", "tasks", "--output", "both", "--base", "my-base", *QUICK]
    assert main(command) == 0
    assert "small/arrow" in capsys.readouterr().out


def test_bad_arguments(folder, capsys):
    common = ["--tasks", "tasks", "--output", "out", *QUICK]
    for arguments, message in (
        (["library", "--methods", "arow"], "'arow', which is unknown"),
        (["library", "--oracle", "a=z"], "own expert 'z' is not in the library"),
        (["library", "library"], "the last part of their names in common"),
    ):
        assert main(["evaluate", *arguments, *common]) == 2
        assert message in capsys.readouterr().err
    for arguments, message in ((["--methods", "arrow:top_k"], "'top_k'"), (["--oracle", "a"], "'a'")):
        with pytest.raises(SystemExit) as exit:
            main(["evaluate", "library", *arguments, *common])
        assert exit.value.code == 2 and f"{message} is not of the form NAME=VALUE" in capsys.readouterr().err
    assert main(["evaluate", "library", "--tasks", "none.jsonl", "--output", "out"]) == 2
    assert "there is no file" in capsys.readouterr().err


def test_options_of_methods():
    assert method_of("arrow") == "arrow"
    assert method_of("lag:filter_k=2,weights=equal,tied=true,null_expert=-0.5") == {
        "router": "lag",
        "filter_k": 2,
        "weights": "equal",
        "tied": True,
        "null_expert": -0.5,
    }
