"""How experts are divided over processes, and how one bar shows what all of them do."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from peft_arrow.training.processes import Processes, balanced
from peft_arrow.training.progress import NOTE, Reporter, forget_notes, planned_steps, reporting
from peft_arrow.training.recipe import sft_arguments


def process(index: int, count: int = 2) -> SimpleNamespace:
    """Stands for the `Processes` of one of several processes."""
    return SimpleNamespace(state=SimpleNamespace(process_index=index), count=count, together=False, is_main=index == 0)


def test_the_loads_of_the_parts_are_about_equal():
    loads = {"one": 24, "six": 144, "two": 48, "another": 24}
    assert balanced(list(loads), loads, 2) == [["six"], ["one", "two", "another"]]
    assert balanced(list(loads), loads, 1) == [list(loads)]
    assert balanced(["a", "b"], {"a": 1, "b": 1}, 3) == [["a"], ["b"], []]
    assert balanced([], {}, 2) == [[], []]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_name_has_one_part_and_keeps_its_order(count):
    loads = {f"task{number}": number % 4 + 1 for number in range(11)}
    parts = balanced(list(loads), loads, count)
    assert sorted(name for part in parts for name in part) == sorted(loads)
    assert all(part == [name for name in loads if name in part] for part in parts)
    sums = [sum(loads[name] for name in part) for part in parts]
    assert max(sums) - min(sums) <= max(loads.values())
    assert balanced(list(loads), loads, count) == parts


def test_one_process_has_all_in_their_order():
    assert Processes().mine(["b", "a"], {"a": 2, "b": 1}) == ["b", "a"] == Processes().mine(["b", "a"])


def test_planned_steps_are_those_of_the_trainer(tmp_path):
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 3}
    assert planned_steps(sft_arguments(given, tmp_path), rows=9) == 9
    assert planned_steps(sft_arguments(given, tmp_path, steps=7), rows=9) == 7


def test_one_bar_for_two_processes(tmp_path, capsys):
    """The second process prints nothing; the first shows its steps and its lines, each line once."""
    steps = {"roman": 4, "sql": 6}
    with reporting("private experts", tmp_path, steps, process(1), shown=True) as other:
        with reporting("private experts", tmp_path, steps, process(0), shown=True) as main:
            on_step = other.begin("sql")
            on_step(6, 6)
            other.end("sql: done")
            assert capsys.readouterr().out == ""
            main.begin("roman")(3, 4)
            main.show()
            shown = capsys.readouterr().err
            assert "9/10" in shown and "roman" in shown and "sql: done\n" in shown
            main.end("roman: failed, for a reason")
    shown = capsys.readouterr().err
    assert "roman: failed, for a reason\n" in shown and "sql: done" not in shown
    assert json.loads((tmp_path / f"{NOTE}1").read_text())["lines"] == ["sql: done"]
    forget_notes(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_note_that_is_being_written_is_read_later(tmp_path, capsys):
    (tmp_path / f"{NOTE}1").write_text('{"process": "1", "st')
    with reporting("private experts", tmp_path, {"roman": 4}, process(0), shown=True) as main:
        main.begin("roman")(2, 4)
        main.show()
        assert "2/4" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"shown": False}, {"shown": True, "index": 1}])
def test_nothing_is_shown(options, tmp_path, capsys):
    with reporting("experts", tmp_path, {"roman": 4}, process(options.pop("index", 0)), **options) as reporter:
        reporter.begin("roman")(1, 4)
        reporter.end("roman: done")
        reporter.show()
    assert capsys.readouterr() == ("", "")


def test_one_process_leaves_no_note(tmp_path):
    reporter = Reporter(tmp_path, process(0, count=1), None)
    reporter.begin("roman")(1, 1)
    reporter.end("done")
    assert not list(tmp_path.iterdir())


def test_nothing_to_train_is_one_line(tmp_path, capsys):
    with reporting("private experts, 2 of 2 are there already", tmp_path, {}, process(0), shown=True):
        pass
    assert capsys.readouterr().err == "private experts, 2 of 2 are there already\n"
