"""Arguments, output and exit codes of `peft-arrow quickstart`."""

from __future__ import annotations

import json

import pytest

from peft_arrow.cli import main, quickstart
from peft_arrow.quickstart import BuildFailed, JudgeSettings, TrainSettings


@pytest.fixture
def calls(monkeypatch):
    """Replace the work by a record of its arguments."""
    made = []

    def run(*args, **kwargs):
        made.append((args, kwargs))
        print("shown")
        return {"answers": {"roman": "IV €"}}

    monkeypatch.setattr(quickstart, "run_quickstart", run)
    return made


def test_defaults_are_those_of_the_function(calls, capsys):
    assert main(["quickstart"]) == 0
    kwargs = {"tasks": None, "prompts": None, "training": TrainSettings(), "judging": JudgeSettings()}
    assert calls == [((None, None, "quickstart_output"), kwargs)]
    assert capsys.readouterr().out == "shown\n"


def test_arguments_reach_the_function(calls):
    line = "quickstart --base b --adapters x y@1 --output o --tasks roman clock --prompts p q\\n"
    assert main([*line.split(), "--steps", "3", "--clusters", "auto", "--heldout", "5", "--top-k", "2"]) == 0
    ((args, kwargs),) = calls
    assert args == ("b", ["x", "y@1"], "o")
    assert kwargs["tasks"] == ["roman", "clock"] and kwargs["prompts"] == ["p", "q\n"]
    assert kwargs["training"] == TrainSettings(steps=3, clusters="auto")
    assert kwargs["judging"] == JudgeSettings(heldout=5, top_k=2)


def test_json_is_all_of_stdout(calls, capsys):
    assert main(["quickstart", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"answers": {"roman": "IV €"}}
    assert captured.err == "shown\n"


@pytest.mark.parametrize(
    "line",
    ["", "fly", "quickstart --steps 0", "quickstart --top-k 2.5", "quickstart --clusters 0", "quickstart --adapters"],
)
def test_bad_arguments_are_2(line, calls, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    assert stopped.value.code == 2 and not calls
    assert "peft-arrow" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError("no such"), 2), (OSError("disk full"), 1), (KeyboardInterrupt(), 1)]
)
def test_exit_codes_of_failures(error, code, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(quickstart, "run_quickstart", fail)
    assert main(["quickstart"]) == code
    assert str(error) in capsys.readouterr().err


def test_a_build_that_failed_is_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise BuildFailed("1 experts failed")

    monkeypatch.setattr(quickstart, "run_quickstart", fail)
    with pytest.raises(SystemExit, match="^peft-arrow quickstart: 1 experts failed$"):
        main(["quickstart"])


def test_unknown_task_is_refused_before_any_work(tmp_path, capsys):
    assert main(["quickstart", "--tasks", "cooking", "--output", str(tmp_path / "out")]) == 2
    assert "allowed are german_number" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["quickstart", "--help"])
    assert stopped.value.code == 0
    assert "examples:\n  peft-arrow quickstart\n" in capsys.readouterr().out
