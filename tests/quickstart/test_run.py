"""The whole flow on a pico model with given adapters, where nothing is trained."""

from __future__ import annotations

import json

import pytest

from peft_arrow import ArrowLoraModel
from peft_arrow.quickstart import run, run_quickstart
from peft_arrow.quickstart.tasks import Row


@pytest.fixture
def pico(monkeypatch, base, tokenizer):
    monkeypatch.setattr(run, "load_base", lambda name: (base, tokenizer))


def test_given_adapters_are_answered_and_drawn(pico, adapter_folders, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    adapters = list(adapter_folders.values())
    result = run_quickstart("pico", adapters, tmp_path, prompts=["one", "twenty-two"])
    assert "methods" not in result and list(result["answers"]) == ["prompt 1", "prompt 2"]
    assert result["answers"]["prompt 2"]["prompt"] == "twenty-two"
    names = ["experts_by_layer.png", "experts_by_task.png", "report.json", "tokens.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert json.loads((tmp_path / "report.json").read_text()) == result
    assert "[prompt 1] one" in capsys.readouterr().out


def test_a_batch_is_answered_as_its_rows_alone(pico, base, tokenizer, adapter_folders):
    model = ArrowLoraModel.from_pretrained(base, adapters=adapter_folders)
    rows = {name: Row(name, "", (), "") for name in ("one", "twenty-two")}
    together = run.answer_batch(model, tokenizer, rows)
    for name, row in rows.items():
        assert run.answer_batch(model, tokenizer, {name: row})[name] == together[name]


def test_answers_of_an_earlier_run_are_used_only_for_the_same_adapters(tmp_path):
    report = {"fingerprint": "one", "answers": {"roman": {}}, "files": [str(tmp_path / "tokens.html")]}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert run.earlier_answers(tmp_path, "one") == {}
    (tmp_path / "tokens.html").write_text("page")
    assert run.earlier_answers(tmp_path, "one") == {"answers": report["answers"], "files": report["files"]}
    assert run.earlier_answers(tmp_path, "two") == run.earlier_answers(tmp_path, None) == {}
    (tmp_path / "report.json").write_text("{}")
    assert run.earlier_answers(tmp_path, "one") == {}
