"""Tables and pictures of small traces whose numbers are known."""

from __future__ import annotations

import builtins

import pytest

from peft_arrow.tuner.trace_pictures import draw_heat_map, plot_routing
from peft_arrow.tuner.trace_report import LINE_WIDTH, routing_table
from tests.tuner.traces import inputs, module, step, trace_of, two_rows


def test_table():
    lines = routing_table(two_rows()).splitlines()
    assert lines[0] == "Share of the routing weight in percent, padding left out."
    assert lines[2].split() == ["by", "kind", "of", "module", "all", "q_proj", "up_proj"]
    assert [line.split() for line in lines[3:6]] == [
        ["a", "37.5", "75.0", "0.0"],
        ["b", "12.5", "25.0", "0.0"],
        ["c", "50.0", "0.0", "100.0"],
    ]
    assert lines[7].split() == ["by", "layer", "0", "1"]
    assert lines[10].split() == ["c", "0.0", "100.0"]
    assert not any("by task" in line or "oracle" in line for line in lines)
    assert routing_table(trace_of()) == "The trace holds no forward pass."


def test_table_of_tasks():
    """Weights .75 .25, 1 0 | .5 .5 in layer 0: H = .5623, 0 and ln 2 = .6931; own experts a and b."""
    text = routing_table(two_rows(("dates", "plurals")), {"dates": "a", "plurals": "b"})
    lines = [line.split() for line in text.splitlines()]
    assert ["by", "task", "dates", "plurals"] in lines
    assert ["a", "43.8", "25.0"] in lines and ["c", "50.0", "50.0"] in lines
    # (.5623 + 0 + .6931) / 3 = .4185, exp 1.52; shares .75 .25: .5623, exp 1.75
    assert ["q_proj", "0.418", "1.52", "0.562", "1.75"] in lines
    assert ["up_proj", "0.000", "1.00", "0.000", "1.00"] in lines
    # top: a, a, half of a tie; weight (.75 + 1 + .5) / 3; only q_proj has a and b
    assert ["q_proj", "83.3", "75.0", "33.3", "3"] in lines
    assert ["task", "plurals", "50.0", "50.0", "33.3", "1"] in lines
    assert not any(line[:1] == ["up_proj"] and len(line) == 5 and line[4] == "3" for line in lines)


def test_table_groups_many_layers():
    one = module([[[0]]], [[[1.0]]])
    trace = trace_of(step({f"model.layers.{layer}.q_proj": one for layer in range(30)}))
    assert routing_table(trace).splitlines()[7].split()[2:] == ["0-4", "5-9", "10-14", "15-19", "20-24", "25-29"]


def test_table_of_many_tasks_stays_narrow():
    names = tuple(f"a-task-with-a-long-name-{number}" for number in range(12))
    given = inputs([[5]] * 12, tasks=names)
    text = routing_table(trace_of(step({"q": module([[[0]]] * 12, [[[1.0]]] * 12, given)}), names=["e" * 90, "b"]))
    assert max(map(len, text.splitlines())) <= LINE_WIDTH
    assert sum(line.startswith("by task") for line in text.splitlines()) == 6
    assert all(name in text for name in names) and "e" * 46 + "\u2026" in text


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    plot_routing(two_rows(), tmp_path / "routing.png")
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")
    labels = {"columns": ("expert", ["a", "b"]), "rows": ("task", ["t $x$ {"])}
    draw_heat_map([[0.25, 0.75]], tmp_path / "tasks.svg", title="shares", annotate=True, **labels)
    assert "<svg" in (tmp_path / "tasks.svg").read_text()


@pytest.mark.parametrize("by", ["all", "task", "kind", "module"])
def test_plot_of_groups(by, tmp_path):
    pytest.importorskip("matplotlib")
    two_rows(("a", "$ _ $ {")).plot(tmp_path / "routing.png", by=by, own_experts={"$ _ $ {": "c"})
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_plot_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"by='task' cannot be drawn.* trace_routing\(tasks="):
        two_rows().plot(tmp_path / "routing.png", by="task")
    with pytest.raises(ValueError, match="no forward pass"):
        trace_of().plot(tmp_path / "routing.png")
    assert not (tmp_path / "routing.png").exists()


def test_plot_names_the_extra(tmp_path, monkeypatch):
    find = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r"peft-arrow\[viz\]"):
        plot_routing(two_rows(), tmp_path / "routing.png")
