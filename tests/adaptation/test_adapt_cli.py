"""`peft-arrow adapt`: what is printed, what is refused, exit codes."""

from __future__ import annotations

import json

import pytest

from peft_arrow.cli import adapt as command
from peft_arrow.cli import main
from tests.adaptation.data import ROWS, base_in, config_of, library_in


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder with a base, a library and a task, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    base_in(tmp_path)
    library_in(tmp_path).save_pretrained("library")
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


QUICK = ["--data", "task.jsonl", "--steps", "2", "--batch-size", "2", "--max-length", "32", "--output", "adapted"]


def test_the_library_names_the_base(reader, capsys):
    assert main(["adapt", "library", *QUICK, "--method", "poly", "--lr", "0.01"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("adapted: 2 steps, ") and printed.endswith(", in adapted\n")
    assert config_of("adapted")["r"] == 2
    assert main(["adapt", "library", *QUICK, "--method", "poly", "--lr", "0.01", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["method"], told["steps"], len(told["losses"])) == ("poly", 2, 2)


def test_scratch_needs_no_library(reader, capsys):
    assert main(["adapt", "--base", "base", *QUICK, "--method", "scratch"]) == 0
    assert config_of("adapted")["r"] == 4
    assert main(["adapt", *QUICK, "--method", "scratch"]) == 2
    assert "--base is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--method", "poly", "--top-k", "2"], "top_k=2 is not for method='poly'"),
        (["--method", "shared"], "the library has 3"),
        (["--method", "lorahub", "--aggregation", "output"], "aggregation='output' is not for method='lorahub'"),
    ],
)
def test_bad_arguments_write_nothing(reader, capsys, words, told):
    assert main(["adapt", "library", *QUICK, *words]) == 2
    assert told in capsys.readouterr().err and not (reader / "adapted").exists()


def test_methods_are_those_of_the_function():
    from peft_arrow.adaptation.methods import METHODS

    assert sorted(command.METHODS) == sorted(METHODS)
