"""The whole flow on a pico model: with given adapters, where nothing is trained, and from data to a routed library."""

from __future__ import annotations

import json

import pytest

from peft_arrow import ArrowLoraModel
from peft_arrow.quickstart import JudgeSettings, TrainSettings, run, run_quickstart
from peft_arrow.quickstart.tasks import Row
from tests.building.data import base_in


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


def test_from_tasks_to_a_routed_library(tmp_path, capsys):
    """A library with its card, the tables, pictures; a second run does nothing; one more task does what is new."""
    pytest.importorskip("matplotlib")
    base, output = base_in(tmp_path), tmp_path / "out"
    options = {
        "training": TrainSettings(steps=5, rows=16, rank=2, clusters=2),
        "judging": JudgeSettings(heldout=2, seeds=2),
        "workers": 1,
    }
    result = run_quickstart(base, output=output, tasks=["roman", "plural", "spell"], **options)
    assert len(result["clusters"]) == 2 and result["settings"]["base"] == base
    order = [task for tasks in result["clusters"].values() for task in tasks]
    assert all(list(scores) == order for scores in result["methods"].values())
    printed = capsys.readouterr().out
    assert printed.startswith("\nClusters of the 3 private adapters") and printed.index("roman") < printed.index(
        "Took"
    )
    for name in ("library/README.md", "library-training/clustering/similarity.png", "experts_by_task.png"):
        assert str(output / name) in printed and (output / name).exists()
    assert f'from_pretrained("{base}", "{output}/library")' in printed
    card = (output / "library/README.md").read_text()
    assert "peft-arrow quickstart --base my-base --tasks roman plural spell --steps 5 --clusters 2" in card
    assert "| mean over tasks | held-out | exact match | arrow |" in card and "](pictures/similarity.png)" in card
    routed = ArrowLoraModel.from_pretrained(base, str(output / "library"))
    assert routed.expert_names == list(result["clusters"])
    again = run_quickstart(base, output=output, tasks=["roman", "plural", "spell"], **options)
    assert {**again, "seconds": 0} == {**result, "seconds": 0}
    captured = capsys.readouterr()
    assert captured.out.split("Took")[0] == printed.split("Took")[0] and "stage" not in captured.err
    alone = run_quickstart(base, output=output, tasks=["clock"], **options)
    assert alone["clusters"] == {"cluster_0": ["clock"]} and alone["settings"]["clusters"] == 1
    assert json.loads((output / "report.json").read_text()) == alone


@pytest.mark.parametrize(
    ("clusters", "tasks", "expected"), [(4, 10, 4), (4, 3, 3), ("auto", 10, "auto"), ("auto", 2, 2), (1, 1, 1)]
)
def test_clusters_are_at_most_the_tasks(clusters, tasks, expected):
    assert run.with_clusters(TrainSettings(clusters=clusters), tasks).clusters == expected


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
