"""Tables, pictures and pages of small traces whose shares are known."""

from __future__ import annotations

import builtins
from types import SimpleNamespace

import pytest
import torch

from peft_arrow.tuner.trace_report import (
    draw_heat_map,
    layer_labels,
    layer_of,
    plot_routing,
    routing_html,
    routing_shares,
    routing_table,
)


def module(index, weights):
    return SimpleNamespace(top_k_index=torch.tensor(index), top_k_weights=torch.tensor(weights, dtype=torch.float32))


def step(modules, attention_mask=None, input_ids=None):
    as_tensor = lambda value: None if value is None else torch.tensor(value)  # noqa: E731
    return SimpleNamespace(modules=modules, attention_mask=as_tensor(attention_mask), input_ids=as_tensor(input_ids))


def trace_of(*steps, names=("a", "b", "c")):
    return SimpleNamespace(expert_names=list(names), steps=list(steps))


@pytest.fixture
def trace():
    """Two rows of two tokens, the first of row 2 is padding; expert c is never chosen in layer 0."""
    first = module([[[0, 1], [0, 1]], [[1, 2], [0, 1]]], [[[0.75, 0.25], [1.0, 0.0]], [[0.5, 0.5], [0.5, 0.5]]])
    last = module([[[2, -1], [2, -1]], [[0, -1], [2, -1]]], [[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]])
    modules = {"model.layers.0.self_attn.q_proj": first, "model.layers.1.mlp.up_proj": last}
    return trace_of(step(modules, [[1, 1], [0, 1]], [[5, 6], [0, 7]]))


class Tokenizer:
    def decode(self, ids):
        return {5: "<b>", 6: " & more\n", 7: "x"}[ids[0]]


def test_layers_of_names():
    assert layer_of("model.layers.12.mlp.up_proj") == "model.layers.12"
    assert layer_of("score") == "score"
    assert layer_labels(["model.layers.0", "model.layers.1"]) == ["0", "1"]
    assert layer_labels(["encoder.block.0", "decoder.block.0"]) == ["encoder.block.0", "decoder.block.0"]


def test_shares_leave_out_padding(trace):
    shares = routing_shares(trace)
    assert shares["model.layers.0"] == pytest.approx([2.25 / 3, 0.75 / 3, 0])
    assert shares["model.layers.1"] == pytest.approx([0, 0, 1])


def test_shares_of_some_rows(trace):
    assert routing_shares(trace, rows=[1])["model.layers.0"] == pytest.approx([0.5, 0.5, 0])


def test_shares_count_every_token_of_a_module_with_another_shape():
    decoder = module([[[0], [1], [1]]], [[[1.0], [1.0], [1.0]]])
    trace = trace_of(step({"decoder.block.0.q": decoder}, [[0, 1]], [[3, 4]]))
    assert routing_shares(trace)["decoder.block.0"] == pytest.approx([1 / 3, 2 / 3, 0])


def test_shares_of_a_decoding_step_use_the_end_of_the_mask():
    decoded = module([[[0]], [[2]]], [[[1.0]], [[1.0]]])
    trace = trace_of(step({"model.layers.0.q": decoded}, [[0, 1, 1], [1, 1, 0]], [[3], [4]]))
    assert routing_shares(trace)["model.layers.0"] == pytest.approx([1, 0, 0])


def test_table(trace):
    lines = routing_table(trace).splitlines()
    assert lines[0] == "Share of the routing weight in percent, padding left out."
    assert lines[2].split() == ["by", "kind", "of", "module", "all", "q_proj", "up_proj"]
    assert [line.split() for line in lines[3:6]] == [
        ["a", "37.5", "75.0", "0.0"],
        ["b", "12.5", "25.0", "0.0"],
        ["c", "50.0", "0.0", "100.0"],
    ]
    assert lines[7].split() == ["by", "layer", "0", "1"]
    assert lines[10].split() == ["c", "0.0", "100.0"]
    assert routing_table(trace_of()) == "The trace holds no forward pass."


def test_table_groups_many_layers():
    one = module([[[0]]], [[[1.0]]])
    trace = trace_of(step({f"model.layers.{layer}.q_proj": one for layer in range(30)}))
    assert routing_table(trace).splitlines()[7].split()[2:] == ["0-4", "5-9", "10-14", "15-19", "20-24", "25-29"]


def test_plot(trace, tmp_path):
    pytest.importorskip("matplotlib")
    plot_routing(trace, tmp_path / "routing.png")
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")
    labels = {"columns": ("expert", ["a", "b"]), "rows": ("task", ["t"])}
    draw_heat_map([[0.25, 0.75]], tmp_path / "tasks.svg", title="shares", annotate=True, **labels)
    assert "<svg" in (tmp_path / "tasks.svg").read_text()


def test_plot_names_the_extra(trace, tmp_path, monkeypatch):
    find = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r"peft-arrow\[viz\]"):
        plot_routing(trace, tmp_path / "routing.png")


def test_html_escapes_tokens_and_leaves_out_padding(trace, tmp_path):
    routing_html(trace, tmp_path / "page.html", Tokenizer(), labels=["plurals & co"])
    page = (tmp_path / "page.html").read_text()
    assert page.count("<span class='t ") == 3
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert " &amp; more\u21b5" in page
    assert "plurals &amp; co" in page and "call 1, row 2" in page
    assert "layer 0: a 0.75, b 0.25&#10;layer 1: c 1.00" in page
    assert "src=" not in page and "http" not in page
    assert 'const names = ["all", "0", "1"];' in page


def test_html_without_tokenizer_shows_ids(trace, tmp_path):
    routing_html(trace, tmp_path / "page.html")
    assert ">[5]</span>" in (tmp_path / "page.html").read_text()


def test_html_continues_a_row_with_its_decoding_steps(tmp_path):
    prompt, decoded = module([[[0], [1]]], [[[1.0], [1.0]]]), module([[[2]]], [[[1.0]]])
    steps = [
        step({"model.layers.0.q": prompt}, [[1, 1]], [[5, 6]]),
        step({"model.layers.0.q": decoded}, [[1, 1, 1]], [[7]]),
        step({"model.layers.0.q": prompt}, [[1, 1]], [[5, 6]]),
    ]
    routing_html(trace_of(*steps), tmp_path / "page.html", Tokenizer())
    page = (tmp_path / "page.html").read_text()
    assert page.count("<h2>") == 2
    first, second = page.split("<h2>")[1:]
    assert [part.split("'")[0] for part in first.split("data-e='")[1:]] == ["0 0", "1 1", "2 2"]
    assert second.count("data-e=") == 2


def test_html_of_inputs_without_a_batch(tmp_path):
    routing_html(trace_of(step({"0.q": module([[0], [1]], [[1.0], [1.0]])})), tmp_path / "page.html")
    assert ">[1]</span>" in (tmp_path / "page.html").read_text()
