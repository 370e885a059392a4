"""The tables, sentences and pictures of a run whose numbers are known."""

from __future__ import annotations

import pytest

from peft_arrow import ArrowLoraModel
from peft_arrow.quickstart import pictures, report
from peft_arrow.quickstart.tasks import Row


COLUMNS = ["base", "uniform", "random", "single", "arrow", "arrow_private", "own_cluster", "own_private"]


def score(loss, exact=0.0, rows=2):
    return {"loss": loss, "exact": exact, "row_losses": [loss] * rows}


@pytest.fixture
def result():
    methods = {
        "base": {"roman": score(4.0), "plural": score(6.0)},
        "uniform": {"roman": score(2.0), "plural": score(3.0)},
        "random-0": {"roman": score(2.0), "plural": score(2.0)},
        "random-1": {"roman": score(3.0), "plural": score(3.0)},
        "single": {"roman": score(0.5), "plural": score(5.5)},
        "arrow": {"roman": score(1.0, 0.5), "plural": score(2.0, 0.25)},
        "arrow_private": {"roman": score(1.5), "plural": score(2.5)},
        "own_cluster": {"roman": score(0.5, 1.0), "plural": score(0.25, 0.75)},
        "own_private": {"roman": score(0.75), "plural": score(0.5)},
    }
    return {
        "methods": methods,
        "best_single": "cluster_0",
        "clusters": {"cluster_0": ["roman", "plural"]},
        "silhouette": None,
        "steps": {"cluster_0": 48, "roman": 16, "plural": 16},
        "settings": {"top_k": 4, "seeds": 2, "steps": 40, "base": None},
    }


def test_table_has_one_line_a_task_and_the_mean(result):
    cells = report.table_cells(result["methods"], report.LOSS)
    assert cells == [
        ["task", *COLUMNS],
        ["roman", "4.00", "2.00", "2.50", "0.50", "1.00", "1.50", "0.50", "0.75"],
        ["plural", "6.00", "3.00", "2.50", "5.50", "2.00", "2.50", "0.25", "0.50"],
        ["mean over tasks", "5.00", "2.50", "2.50±0.71", "3.00", "1.50", "2.00", "0.38", "0.62"],
    ]


def test_text_table_has_fixed_width(result):
    lines = report.text_table("Loss", report.table_cells(result["methods"], report.LOSS)).splitlines()
    assert lines[0] == "Loss" and set(lines[1]) == {"-"}
    assert len({len(line) for line in lines[1:]}) == 1
    assert lines[2].split() == ["task", *COLUMNS]


def test_markdown_table(result):
    lines = report.markdown_table("Loss", report.table_cells(result["methods"], report.EXACT)).splitlines()
    assert lines[0] == "### Loss"
    assert lines[3] == "|---|" + 8 * "---:|"
    assert lines[4] == "| roman | 0.00 | 0.00 | 0.00 | 0.00 | 0.50 | 0.00 | 1.00 | 0.00 |"


def test_row_losses(result):
    assert report.row_losses(result["methods"]["base"]) == {"roman": [4.0, 4.0], "plural": [6.0, 6.0]}


def test_text_says_what_the_columns_are(result):
    text = report.render_text(result)
    for part in (
        "Clusters of the 2 private adapters by their weights",
        "an expert of its own:\n  cluster_0: roman, plural",
        "2 held-out rows a task",
        "40 optimizer steps a task: 16 for its private adapter",
        "those of all its tasks: cluster_0 48.",
        "'cluster_0' for everything",
        "1 of the clusters' experts for each token",
        "Arrow routing between the private adapters (2), top_k=4",
        "mean of 2 seeds",
        "  own_cluster   +1.125",
    ):
        assert part in text
    assert "### Exact match" in report.render_markdown(result)


def test_every_column_is_explained(result):
    explained = "\n".join(report.explanation(result))
    assert all(f"\n{column}: " in explained for column in COLUMNS)


def test_figures_for_the_card(result):
    figures = report.evaluations(result)
    arrow = [figure for figure in figures if figure.method == "arrow"]
    assert [(figure.dataset, figure.value) for figure in arrow] == [
        ("mean over tasks", 1.5),
        ("mean over tasks", 0.375),
        ("roman", 1.0),
        ("plural", 2.0),
    ]
    assert {figure.method for figure in figures} >= {"random routing", "each task with its own expert (oracle)"}


def test_only_files_that_are_there_are_listed(result, tmp_path):
    (tmp_path / "library-training/clustering").mkdir(parents=True)
    (tmp_path / "library-training/clustering/similarity.png").write_text("")
    (tmp_path / "report.json").write_text("")
    lines = report.render_files(tmp_path).splitlines()
    assert len(lines) == 3 and "similarity.png" in lines[1] and lines[2].endswith("all numbers")
    told = report.render_next(None, tmp_path)
    assert f'("HuggingFaceTB/SmolLM2-135M-Instruct", "{tmp_path}/library")' in told
    assert f"peft-arrow push {tmp_path}/library you/name" in told


def test_answers_are_one_line_each():
    answers = {"roman": {"prompt": "4?\n", "expected": "IV", "arrow": "IV\nV", "base": "x" * 200}}
    lines = report.render_answers(answers).splitlines()
    assert lines[2:] == [
        "[roman] 4?",
        "  expected: IV",
        "  arrow:    IV \u21b5 V",
        "  base:     " + "x" * 89 + "\u2026",
    ]


def test_an_empty_answer_is_said():
    answers = {"prompt 1": {"prompt": "4?", "expected": "", "arrow": "", "base": " \n"}}
    assert report.render_answers(answers).splitlines()[2:] == [
        "[prompt 1] 4?",
        "  arrow:    (nothing: it ended the text at once)",
        "  base:     (nothing: it ended the text at once)",
    ]


def test_pictures_for_any_number_of_tasks_and_experts(tmp_path):
    pytest.importorskip("matplotlib")
    for count in (1, 5):
        experts = [f"expert-{position}" for position in range(count + 1)]
        layers = {f"model.layers.{layer}": [1 / len(experts)] * len(experts) for layer in range(3)}
        shares = dict.fromkeys(experts[:count], layers)
        own = dict(zip(shares, reversed(experts))) if count > 1 else {}
        pictures.draw_by_task(shares, experts, tmp_path / "task.png", own)
        pictures.draw_by_layer(shares, experts, tmp_path / "layer.png", own)
        for name in ("task.png", "layer.png"):
            assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_shares_per_task(base, tokenizer, adapter_folders):
    model = ArrowLoraModel.from_pretrained(base, adapters=adapter_folders, top_k=2)
    shares = pictures.task_shares(model, tokenizer, {"a": [Row("1\n", "I", (), ""), Row("12\n", "XII", (), "")]})
    assert list(shares["a"]) == ["model.layers.0", "model.layers.1"]
    assert all(sum(layer) == pytest.approx(1) for layer in shares["a"].values())
