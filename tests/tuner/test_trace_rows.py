"""Rows, records and JSON of a trace: texts as people read them, prefill and decoding joined."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers

from peft_arrow.tuner.trace_rows import token_texts
from tests.tuner.traces import Tokenizer, inputs, module, step, trace_of, two_rows


@pytest.fixture
def decoded():
    """A prompt of two tokens with two generated ones, the second of K = 1; then a call of its own."""
    first = inputs([[5, 6]], [[1, 1]], ("dates",))
    second = inputs([[7]], [[1, 1, 1]], ("dates",), first)
    third = inputs([[5]], [[1, 1, 1, 1]], ("dates",), second)
    other = inputs([[7]], [[1]])
    return trace_of(
        step({"0.q": module([[[0, 1], [1, 2]]], [[[0.25, 0.75], [1.0, 0.0]]], first)}),
        step({"0.q": module([[[2, -1]]], [[[1.0, 0.0]]], second)}),
        step({"0.q": module([[[1]]], [[[1.0]]], third)}),
        step({"0.q": module([[[0]]], [[[1.0]]], other)}),
    )


def test_rows_join_prefill_and_decoding(decoded):
    row, other = decoded.rows(Tokenizer())
    assert (row.call, row.row, row.task, row.num_prompt_tokens) == (0, 0, "dates", 2)
    assert row.token_ids == [5, 6, 7, 5] and row.tokens == ["<b>", " & more\n", "x", "<b>"]
    assert row.top_k_index["0.q"].tolist() == [[0, 1], [1, 2], [2, -1], [1, -1]]
    assert row.top_k_weights["0.q"].tolist() == [[0.25, 0.75], [1, 0], [1, 0], [1, 0]]
    assert row.experts("0.q") == [{"b": 0.75, "a": 0.25}, {"b": 1, "c": 0}, {"c": 1}, {"b": 1}]
    assert list(row.experts("0.q")[0]) == ["b", "a"]
    assert (other.call, other.task, other.token_ids, other.title) == (1, None, [7], "call 2, row 1")
    assert row.title == "dates, call 1, row 1"


def test_rows_leave_out_padding_and_rows_without_tokens():
    row, short = two_rows().rows()
    assert row.tokens == ["[5]", "[6]"] and short.tokens == ["[7]"]
    assert short.top_k_index["model.layers.1.mlp.up_proj"].tolist() == [[2, -1]]
    given = inputs([[0, 0], [5, 6]], [[0, 0], [1, 1]])
    trace = trace_of(step({"q": module([[[0], [0]], [[1], [1]]], [[[1.0], [1.0]]] * 2, given)}))
    assert [row.row for row in trace.rows()] == [1]


def test_rows_of_a_module_that_is_called_twice():
    """A model that shares its layers calls a module again on the same tokens."""
    given = inputs([[5]])
    once, again = module([[[0]]], [[[1.0]]], given), module([[[1]]], [[[1.0]]], given)
    (row,) = trace_of(step({"layers.0.q": once}), step({"layers.0.q": again}), step({"layers.0.q": once})).rows()
    assert {name: index.tolist() for name, index in row.top_k_index.items()} == {
        "layers.0.q": [[0]],
        "layers.0.q#2": [[1]],
        "layers.0.q#3": [[0]],
    }


def test_rows_without_known_tokens():
    (row,) = trace_of(step({"0.q": module([[0], [1]], [[1.0], [1.0]]), "1.q": module([[0]], [[1.0]])})).rows()
    assert row.token_ids == [None, None] and row.tokens == ["[0]", "[1]"] and list(row.top_k_index) == ["0.q"]


def test_records(decoded):
    records = decoded.records(Tokenizer())
    assert len(records) == 5
    assert records[2] == {
        "call": 0,
        "row": 0,
        "task": "dates",
        "position": 2,
        "token_id": 7,
        "token": "x",
        "is_generated": True,
        "module": "0.q",
        "layer": "0",
        "kind": "q",
        "experts": ["c"],
        "weights": [1.0],
    }


def test_json(decoded, tmp_path):
    decoded.to_json(tmp_path / "trace.json", Tokenizer())
    content = json.loads((tmp_path / "trace.json").read_text())
    assert content["format_version"] == 1 and content["expert_names"] == ["a", "b", "c"]
    row = content["rows"][0]
    assert row["tokens"] == ["<b>", " & more\n", "x", "<b>"] and row["num_prompt_tokens"] == 2
    assert row["top_k_index"]["0.q"][0] == [0, 1] and row["top_k_weights"]["0.q"][0] == [0.25, 0.75]


def test_names_are_nested_as_the_indices():
    trace = two_rows()
    found = trace["model.layers.0.self_attn.q_proj"]
    named = type(found)(found.top_k_index, found.top_k_weights, trace.expert_names)
    assert named.experts == [[["a", "b"], ["a", "b"]], [["b", "c"], ["a", "b"]]]
    last = trace["model.layers.1.mlp.up_proj"]
    named = type(last)(last.top_k_index, last.top_k_weights, trace.expert_names)
    assert named.experts[0] == [["c", None], ["c", None]]


class Wrapped:
    """A tokenizer of the package tokenizers with the method that transformers gives it."""

    def __init__(self, fast):
        self.fast = fast

    def decode(self, ids):
        return self.fast.decode(ids, skip_special_tokens=False)


def test_token_texts_keep_spaces_and_characters():
    """Bytes of one character are shown with the last; a space at the start of a word is not lost."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Fast(models.BPE({token: position for position, token in enumerate(alphabet)}, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    ids = fast.encode("a \u20ac\U0001f600b").ids
    assert token_texts(ids, Wrapped(fast)) == ["a", " ", *"\ufffd\ufffd\u20ac", *"\ufffd\ufffd\ufffd\U0001f600", "b"]
    words = Fast(models.WordLevel({"\u2581the": 0, "\u2581cat": 1, "s": 2, "<unk>": 3}, "<unk>"))
    words.decoder = decoders.Metaspace()
    assert token_texts([0, 1, 2, 1], Wrapped(words)) == ["the", " cat", "s", " cat"]
    assert token_texts([], None) == [] and token_texts(torch.tensor([4]).tolist(), None) == ["[4]"]
