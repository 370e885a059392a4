"""The page: one file, no way out of its data, and figures that a browser reads as they were."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from peft_arrow.tuner.trace import ModuleTrace
from peft_arrow.tuner.trace_page import page_data, routing_html
from tests.tuner.traces import Tokenizer, inputs, module, step, trace_of, two_rows


HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">'&\u202e<!--"


class Hostile:
    def decode(self, ids):
        return HOSTILE * len(ids)


class Elements(HTMLParser):
    """What an HTML parser sees."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.data, self.inside = [], [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.inside = (tag, dict(attributes).get("id"))

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == ("script", "data"):
            self.data.append(data)


def read(path):
    page = Elements(path.read_text(encoding="utf-8"))
    return page, json.loads("".join(page.data))


def integers(text, shape, width=1):
    return np.frombuffer(base64.b64decode(text), f"<u{width}").reshape(shape)


def test_the_page_holds_the_trace(tmp_path):
    trace = two_rows(("plurals", "dates & co"))
    trace.html(tmp_path / "page.html", Tokenizer())
    _, data = read(tmp_path / "page.html")
    assert data["experts"] == ["a", "b", "c"] and data["layers"] == ["0", "1"]
    assert data["kinds"] == ["q_proj", "up_proj"] and data["modules"] == [[0, 0], [1, 1]]
    first, second = data["rows"]
    assert first["title"] == "plurals, call 1, row 1" and second["title"] == "dates & co, call 1, row 2"
    assert first["tokens"] == ["<b>", " & more\n"] and second["tokens"] == ["x"] and first["ids"] == [5, 6]
    assert integers(first["index"], (2, 2, 2)).tolist() == [[[0, 1], [0, 1]], [[2, 255], [2, 255]]]
    weights = integers(first["weights"], (2, 2, 2)) / 255
    assert np.abs(weights - [[[0.75, 0.25], [1, 0]], [[1, 0], [1, 0]]]).max() <= 0.5 / 255
    assert integers(second["index"], (2, 1, 2)).tolist() == [[[0, 1]], [[2, 255]]]


def test_prompt_and_generated_tokens(tmp_path):
    prompt = inputs([[5, 6]], [[1, 1]])
    answer = inputs([[7]], [[1, 1, 1]], continues=prompt)
    trace = trace_of(
        step({"0.q": module([[[0], [1]]], [[[1.0], [1.0]]], prompt)}),
        step({"0.q": module([[[2]]], [[[1.0]]], answer)}),
    )
    (row,) = page_data(trace, Tokenizer())["rows"]
    assert (row["prompt"], len(row["tokens"])) == (2, 3)
    assert integers(row["index"], (3,)).tolist() == [0, 1, 2]


def test_the_page_needs_nothing_else(tmp_path):
    routing_html(two_rows(), tmp_path / "page.html")
    page, _ = read(tmp_path / "page.html")
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "href", "srcset", "action", "style"} and not any(
        name.startswith("on") for name in names
    )
    text = (tmp_path / "page.html").read_text()
    assert "http://" not in text and "https://" not in text and "@import" not in text and "url(" not in text
    assert "default-src 'none'" in text
    # nothing that is shown is ever read as markup
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text)


def test_hostile_texts_stay_data(tmp_path):
    tasks = (HOSTILE, "{{data}}")
    trace = two_rows(tasks)
    trace.expert_names[0] = HOSTILE
    routing_html(trace, tmp_path / "page.html", Hostile(), title="{{data}}" + HOSTILE)
    routing_html(two_rows(), tmp_path / "plain.html", Tokenizer(), title="plain")
    page, data = read(tmp_path / "page.html")
    assert page.tags == read(tmp_path / "plain.html")[0].tags
    assert data["experts"][0] == HOSTILE and set(data["rows"][0]["tokens"]) == {HOSTILE}
    assert data["rows"][0]["title"].startswith(HOSTILE) and data["rows"][1]["title"].startswith("{{data}}")
    assert (tmp_path / "page.html").read_text().count(html.escape(HOSTILE)) == 2


def test_many_experts_and_broken_weights():
    """Two bytes a figure where one cannot hold a position; NaN of a broken model is drawn as nothing."""
    trace = trace_of(step({"0.q": module([[[0, 299]]], [[[float("nan"), 0.5]]])}), names=[str(n) for n in range(300)])
    data = page_data(trace)
    assert data["bytes"] == 2
    assert integers(data["rows"][0]["index"], (2,), 2).tolist() == [0, 299]
    assert integers(data["rows"][0]["weights"], (2,), 2).tolist() == [0, 32768]


def large_trace(tokens=200, experts=16, top_k=4):
    generator = torch.Generator().manual_seed(0)
    given = inputs([[5] * tokens])
    modules = {}
    for layer in range(30):
        for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            scores = torch.randn(1, tokens, experts, generator=generator)
            top, index = scores.topk(top_k, dim=-1)
            modules[f"model.layers.{layer}.x.{kind}"] = ModuleTrace(
                index, top.softmax(-1), (), tuple(range(experts)), given
            )
    return trace_of(step(modules), names=[f"expert-{number}" for number in range(experts)])


@pytest.mark.parametrize(("top_k", "most"), [(4, 500_000), (16, 1_850_000)])
def test_the_size_of_a_large_page(top_k, most, tmp_path):
    """30 layers of 7 modules, 200 tokens, 16 experts: two bytes for each of the K figures, a third more as text."""
    large_trace(top_k=top_k).html(tmp_path / "page.html", Tokenizer())
    size = (tmp_path / "page.html").stat().st_size
    assert 4 / 3 * 2 * 30 * 7 * 200 * top_k < size < most


def test_no_tokens(tmp_path):
    routing_html(trace_of(), tmp_path / "page.html")
    assert read(tmp_path / "page.html")[1]["rows"] == []


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
def test_a_browser_draws_it(tmp_path):
    """The script runs without error: legend, tokens and layers are there, and hostile texts are shown as text."""
    trace = two_rows((HOSTILE, "dates"))
    trace.expert_names[0] = HOSTILE
    routing_html(trace, tmp_path / "page.html", Hostile())
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000"]
    done = subprocess.run(
        [*command, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "page.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    drawn = Elements(done.stdout)
    assert done.stdout.count('class="t"') == 2 and "<title>Experts of each token</title>" in done.stdout
    assert drawn.tags.count("button") == 3 and drawn.tags.count("canvas") == 1 and "img" not in drawn.tags
    assert "43.7 %" in done.stdout and "\\u{202e}" in done.stdout
