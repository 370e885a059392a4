"""`peft-arrow route`: what it writes, what it prints, and what it refuses."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

from peft_arrow import AdapterLibrary, ArrowLoraModel
from peft_arrow.cli import main, route
from peft_arrow.cli.router_options import router_of
from peft_arrow.quickstart.base import BASE_ID
from peft_arrow.tracing import RoutedSource, Text, read_texts, route_texts
from tests.pico import pico_base


@pytest.fixture
def folder(tmp_path, adapter_folders, base, tokenizer, monkeypatch):
    """A working folder with a base and a library of three experts."""
    monkeypatch.chdir(tmp_path)
    base.save_pretrained("base")
    tokenizer.save_pretrained("base")
    AdapterLibrary.from_pretrained(adapter_folders, "./base").save_pretrained("library")
    return tmp_path


def run(capsys, *arguments):
    assert main(["route", *arguments]) == 0
    return capsys.readouterr().out


def test_a_text(folder, capsys):
    """The table is that of the model; picture, page and JSON are written; the base is what the library names."""
    pytest.importorskip("matplotlib")
    out = run(capsys, "library", "--text", "plural of fish:", "a\\nb", "--top-k", "2", "--output", "out")
    model = ArrowLoraModel.from_pretrained(pico_base(), "library", top_k=2)
    tokenizer = route.load_base("base")[1]
    with torch.no_grad(), model.trace_routing() as trace:
        for text in ("plural of fish:", "a\nb"):
            model(**tokenizer(text, return_tensors="pt"))
    assert out.startswith(trace.table())
    assert (folder / "out/routing.png").read_bytes().startswith(b"\x89PNG")
    assert "<!doctype html>" in (folder / "out/routing.html").read_text()
    rows = json.loads((folder / "out/routing.json").read_text())["rows"]
    assert ["".join(row["tokens"]) for row in rows] == ["plural of fish:", "a\nb"]
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["routing.html", "routing.json", "routing.png"]


def test_tasks_and_generation_as_json(folder, capsys):
    pytest.importorskip("matplotlib")
    rows = [
        {"prompt": "fish:", "completion": " fishes", "task": "plurals"},
        {"messages": [{"role": "user", "content": "3 May"}], "task": "days"},
        {"text": "select"},
    ]
    (folder / "rows.jsonl").write_text("\n".join([*map(json.dumps, rows), "", ""]))
    options = ["--max-new-tokens", "3", "--router", "spectr:top_k=1,weights=equal", "--oracle", "days=dates"]
    out = run(capsys, "library", "--prompts", "rows.jsonl", *options, "--json", "--output", "out")
    told = json.loads(out)
    assert told["base"] == "./base" and told["own_experts"] == {"plurals": "plurals", "days": "dates"}
    assert [text["task"] for text in told["texts"]] == ["plurals", "days", None]
    assert told["texts"][1]["prompt"] == "user: 3 May\n" and isinstance(told["texts"][0]["generated"], str)
    assert set(told["shares"]["task"]) == set(told["agreement"]["task"]) == {"plurals", "days"}
    assert told["entropy"]["all"]["all"]["nats"] == 0  # one expert a token
    assert [path.rpartition("/")[2] for path in told["files"]] == [
        *("routing.json", "routing.html", "routing.png", "routing_by_task.png")
    ]
    saved = json.loads((folder / "out/routing.json").read_text())["rows"]
    assert [(row["num_prompt_tokens"], len(row["tokens"])) for row in saved] == [(5, 7), (12, 14), (6, 8)]


def test_a_file_and_a_saved_model(folder, adapter_folders, base, capsys):
    """A routed model keeps its router; options on the command line win."""
    pytest.importorskip("matplotlib")
    (folder / "letter.txt").write_text("dear \u20ac")
    model = ArrowLoraModel.from_pretrained(base, adapter_folders, router="uniform")
    model.save_pretrained("routed")
    plain = run(capsys, "routed", "--base", "base", "--file", "letter.txt", "--json", "--output", "one")
    assert json.loads(plain)["shares"]["kind"]["q_proj"] == pytest.approx([1 / 3] * 3)
    chosen = run(capsys, "routed", "--base", "base", "--file", "letter.txt", "--router", "arrow:top_k=1", "--json")
    assert json.loads(chosen)["entropy"]["all"]["all"]["nats"] == 0
    assert (folder / "routing/routing.html").exists()


def test_a_router_that_needs_data(folder, capsys):
    pytest.importorskip("matplotlib")
    for expert in ("plurals", "dates", "sql"):
        rows = [{"prompt": f"{expert} {number}", "completion": expert} for number in range(3)]
        (folder / f"{expert}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = ["plurals.jsonl", "dates.jsonl", "sql.jsonl"]
    out = run(capsys, "library", "--text", "sql 1", "--router", "centroid:top_k=1", "--fit-data", *files, "--json")
    assert sum(json.loads(out)["shares"]["all"]["all"]) == pytest.approx(1)
    assert main(["route", "library", "--text", "sql 1", "--router", "centroid"]) == 2
    assert "fit_router" in capsys.readouterr().err
    out = run(capsys, "library", "--text", "sql 1", "--router", "arrow:calibrated=true", "--json")
    assert sum(json.loads(out)["shares"]["all"]["all"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["library", "--text", ""], "text 1 is empty"),
        (["library", "--text", "x" * 300], "text 1 has 300 tokens with those to generate, and the base takes 256"),
        (["library", "--text", "x" * 250, "--max-new-tokens", "9"], "has 259 tokens"),
        (["library", "--prompts", "empty.jsonl"], "'empty.jsonl' has no rows"),
        (["library", "--prompts", "broken.jsonl"], "line 2 of 'broken.jsonl' is no JSON"),
        (["library", "--prompts", "other.jsonl"], "has none of the keys prompt, messages, instruction, text"),
        (["library", "--prompts", "number.jsonl"], "'prompt' is '3'; it must be a text or a chat"),
        (["library", "--prompts", "task.jsonl"], "'task' is 3; it must be a name"),
        (["library", "--file", "binary"], "'binary' is no UTF-8 text"),
        (["library", "--text", "x", "--oracle", "a=b"], "own_experts['a']='b' is no expert"),
        (["library", "--text", "x", "--router", "arrow:speed=3"], "unknown argument 'speed'"),
        (["nothing", "--text", "x"], "nothing"),
    ],
)
def test_what_is_refused_is_2(options, told, folder, capsys):
    (folder / "empty.jsonl").write_text("\n")
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text"')
    (folder / "other.jsonl").write_text('{"question": "a"}')
    (folder / "number.jsonl").write_text('{"prompt": 3}')
    (folder / "task.jsonl").write_text('{"prompt": "a", "task": 3}')
    (folder / "binary").write_bytes(b"\xff\xfe\x00")
    assert main(["route", *options]) == 2
    captured = capsys.readouterr()
    assert told in captured.err and not captured.out and not (folder / "routing").exists()


@pytest.mark.parametrize(
    "line",
    [
        *("route", "route x", "route x --text a --file b", "route x --text a --top-k 0", "route --text a"),
        *("route x --text a --router nobody", "route x --text a --router arrow:top_k", "route x --text a --oracle b"),
    ],
)
def test_bad_arguments_are_2(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    assert stopped.value.code == 2
    assert "peft-arrow" in capsys.readouterr().err


def test_a_missing_file_is_1(folder, capsys):
    assert main(["route", "library", "--file", "nowhere.txt"]) == 1
    assert "nowhere.txt" in capsys.readouterr().err


def test_smollm2_is_taken_from_the_wheel(folder, adapter_folders, monkeypatch, base, tokenizer):
    """Where the library names it and no base is given; an explicit base is loaded as it is called."""
    asked = []
    monkeypatch.setattr(route, "load_base", lambda name, dtype: asked.append(name) or (pico_base(), tokenizer))
    AdapterLibrary.from_pretrained(adapter_folders, BASE_ID).save_pretrained("small")
    assert main(["route", "small", "--text", "a"]) == 0
    assert main(["route", "small", "--text", "a", "--base", BASE_ID]) == 0
    assert main(["route", "library", "--text", "a"]) == 0
    assert asked == [None, BASE_ID, "./base"]


def test_a_task_finds_the_expert_that_was_trained_for_it(adapter_folders, tmp_path):
    library = AdapterLibrary.from_pretrained(adapter_folders, "base")
    origins = {"plurals": "nouns, verbs", "dates": "days", "sql": "days"}
    adapters = {
        name: replace(adapter, origin=replace(adapter.origin, task=origins[name])) for name, adapter in library.items()
    }
    AdapterLibrary(adapters, "base").save_pretrained(tmp_path / "library")
    source = RoutedSource([str(tmp_path / "library")])
    own = source.own_experts(["verbs", "sql", "days", "other", "verbs"], list(adapters))
    assert own == {"verbs": "plurals", "sql": "sql"}


def test_sources_of_texts(tmp_path):
    with pytest.raises(ValueError, match="no texts given; give one of text, file and prompts"):
        read_texts()
    with pytest.raises(ValueError, match="text and file given"):
        read_texts(["a"], "b")
    assert read_texts(["a", "b"])[1] == Text("b", None, "text 2")


def test_rows_of_instructions(tmp_path):
    """As `train` writes them for its experts; the output is not told."""
    rows = [{"instruction": "Add.", "input": "1 1", "output": "2"}, {"instruction": "Go.", "input": "", "output": "3"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [text.content for text in read_texts(prompts=str(tmp_path / "rows.jsonl"))] == ["Add.\n\n1 1\n", "Go.\n"]


def test_a_chat_needs_a_template(base, tokenizer, adapter_folders):
    model = ArrowLoraModel.from_pretrained(base, adapter_folders)
    tokenizer = copy.deepcopy(tokenizer)  # other tests use it too
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="line 1 is a chat, and the tokenizer of the base has no chat template"):
        route_texts(model, tokenizer, [Text([{"role": "user", "content": "a"}], None, "line 1")])


def test_routers_on_the_command_line():
    assert router_of("arrow") == {"router": "arrow"}
    assert router_of("lag:filter_k=3,score=activation,tied=true,null_expert=0.5") == {
        **{"router": "lag", "filter_k": 3, "score": "activation"},
        **{"tied": True, "null_expert": 0.5},
    }
