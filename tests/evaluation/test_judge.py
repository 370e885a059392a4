"""Whole reports with pico models: each method against the model it stands for, controls, resuming, bad input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from peft_arrow import AdapterLibrary, ArrowLoraModel, Task, evaluate_library
from peft_arrow.evaluation.report import EvaluationReport
from peft_arrow.evaluation.scoring import score_options
from tests.evaluation.made import random_library, random_rows, two_tasks
from tests.pico import pico_base


ROOT = Path(__file__).parent.parent.parent
QUICK = {"max_new_tokens": 4, "draws": 200}


@pytest.fixture
def library(tmp_path):
    return random_library(tmp_path / "adapters")


def losses(model, tokenizer, rows):
    items = [{"prompt": row["prompt"], "options": [row["completion"]]} for row in rows if row["split"] != "train"]
    return [score[0].mean_nll for score in score_options(model, tokenizer, items)]


def test_each_method_is_the_model_it_stands_for(base, tokenizer, library, tmp_path):
    tasks = two_tasks()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    methods = [
        "arrow",
        {"router": "arrow", "top_k": 1, "name": "top-1"},
        "uniform_parameter",
        {"experts": {"a": 0.5, "c": 2.0}, "name": "mix"},
    ]
    report = evaluate_library(base, library, tasks, methods=methods, tokenizer=tokenizer, top_k=2, **QUICK)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not hasattr(base, "peft_config") or not base.peft_config
    found = {name: method.values("loss")["a"] for name, method in report.methods.items()}
    assert found["base"] == pytest.approx(losses(pico_base(), tokenizer, tasks["a"]), abs=1e-4)
    plain = PeftModel.from_pretrained(pico_base(), str(tmp_path / "adapters/a")).eval()
    assert found["oracle"] == pytest.approx(losses(plain, tokenizer, tasks["a"]), abs=1e-4)
    for name, options in {
        "arrow": {"top_k": 2},
        "top-1": {"top_k": 1},
        "uniform": {"router": "uniform"},
        "uniform_parameter": {"router": "uniform", "aggregation": "parameter"},
    }.items():
        model = ArrowLoraModel.from_pretrained(pico_base(), library, **options)
        assert found[name] == pytest.approx(losses(model, tokenizer, tasks["a"]), abs=1e-4), name
    model = ArrowLoraModel.from_pretrained(pico_base(), library)
    with model.pin_experts([{"a": 0.5, "c": 2.0}] * 6):
        assert found["mix"] == pytest.approx(losses(model, tokenizer, tasks["a"]), abs=1e-4)
    assert len(report.methods["random"].runs) == 3 and report.spread("random", "loss") > 0


def test_the_best_single_expert_is_chosen_on_rows_for_training(base, tokenizer, library, tmp_path):
    tasks = two_tasks()
    report = evaluate_library(base, library, tasks, tokenizer=tokenizer, **QUICK)
    means = {}
    for name in library:
        plain = PeftModel.from_pretrained(pico_base(), str(tmp_path / "adapters" / name)).eval()
        train = [[{**row, "split": "x"} for row in rows if row["split"] == "train"] for rows in tasks.values()]
        of_tasks = [losses(plain, tokenizer, rows) for rows in train]
        means[name] = sum(sum(rows) / len(rows) for rows in of_tasks) / 2
    best = report.data["libraries"][""]["best_single"]
    assert best == min(means, key=means.__getitem__)
    plain = PeftModel.from_pretrained(pico_base(), str(tmp_path / "adapters" / best)).eval()
    found = report.methods["best_single"].values("loss")["a"]
    assert found == pytest.approx(losses(plain, tokenizer, tasks["a"]), abs=1e-4)


def test_random_loras_have_the_norms_of_the_experts_and_other_directions(base, tokenizer, library):
    report = evaluate_library(
        base, library, two_tasks(), methods=["arrow"], lora_seeds=2, tokenizer=tokenizer, **QUICK
    )
    runs = report.methods["random_lora"].values_of_runs("loss")
    assert len(runs) == 2 and runs[0] != runs[1]
    assert report.methods["random_lora"].values("loss") != report.methods["arrow"].values("loss")


def test_controls_are_always_there_where_they_are_known(base, tokenizer, library):
    rows = {"t": random_rows("t", "eval", 3, 0)}
    report = evaluate_library(base, library, rows, methods=["spectr"], tokenizer=tokenizer, **QUICK)
    assert list(report.methods) == ["base", "uniform", "random", "random_lora", "spectr"]
    assert [note.split(":")[0] for note in report.data["notes"]] == ["best_single is left out", "oracle is left out"]
    full = evaluate_library(
        base,
        library,
        rows,
        methods=["spectr"],
        oracle={"t": "b"},
        selection={"t": random_rows("t", "train", 3, 0)},
        tokenizer=tokenizer,
        **QUICK,
    )
    assert list(full.methods) == ["base", "uniform", "random", "random_lora", "spectr", "best_single", "oracle"]
    alone = evaluate_library(base, library, rows, methods=["spectr"], controls=False, tokenizer=tokenizer, **QUICK)
    assert list(alone.methods) == ["spectr"] and alone.table()
    with pytest.raises(ValueError, match="oracle is left out: no task has an expert of its own"):
        evaluate_library(base, library, rows, methods=["oracle"], controls=False, tokenizer=tokenizer)


def test_routers_that_are_fitted(base, tokenizer, library):
    tasks, data = two_tasks(), {name: random_rows(name, "train", 3, 0) for name in library}
    report = evaluate_library(
        base, library, tasks, methods=["centroid"], fit_data=data, controls=False, tokenizer=tokenizer, **QUICK
    )
    model = ArrowLoraModel.from_pretrained(pico_base(), library)
    model.fit_router("centroid", data, tokenizer=tokenizer)
    found = report.methods["centroid"].values("loss")["a"]
    assert found == pytest.approx(losses(model, tokenizer, tasks["a"]), abs=1e-4)
    with pytest.raises(ValueError, match="'centroid' has to be fitted first, and fit_data is missing"):
        evaluate_library(base, library, tasks, methods=["centroid"], tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"fit_data is of experts \['x'\], and the library has \['a', 'b', 'c'\]"):
        evaluate_library(base, library, tasks, methods=["centroid"], fit_data={"x": data["a"]}, tokenizer=tokenizer)


def test_nothing_of_one_method_is_left_in_the_next(base, tokenizer, library):
    tasks = {"t": random_rows("t", "eval", 4, 0)}
    odd = {"router": "lag", "filter_k": 2, "top_k": 1, "granularity": "sequence", "tied": True, "name": "odd"}
    calibrated = {"router": "arrow", "calibrated": True, "name": "calibrated"}
    options = {"controls": False, "tokenizer": tokenizer, **QUICK}
    after = evaluate_library(base, library, tasks, methods=[odd, calibrated, "lag", "arrow"], **options)
    for name in ("lag", "arrow"):
        alone = evaluate_library(base, library, tasks, methods=[name], **options)
        assert alone.methods[name].values("loss") == after.methods[name].values("loss")
    assert after.methods["odd"].values("loss") != after.methods["lag"].values("loss")
    assert after.methods["calibrated"].values("loss") != after.methods["arrow"].values("loss")


def test_scores_are_measured_once_for_all_methods_that_read_them(base, tokenizer, library, monkeypatch):
    measured, calibrate = [], ArrowLoraModel.calibrate_router
    monkeypatch.setattr(ArrowLoraModel, "calibrate_router", lambda model: (measured.append(model), calibrate(model)))
    rows = [
        {"router": "arrow", "calibrated": True, "name": "first"},
        {"router": "arrow", "calibrated": True, "top_k": 1, "tied": True, "name": "same"},
        "uniform",
        {"router": "arrow", "calibrated": True, "null_expert": 1.0, "aggregation": "parameter", "name": "still"},
        {"router": "norm", "calibrated": True, "name": "others"},
        {"router": "arrow", "calibrated": True, "top_k": 2, "name": "again"},
    ]
    options = {"controls": False, "tokenizer": tokenizer, **QUICK}
    tasks = {"t": random_rows("t", "eval", 4, 0)}
    after = evaluate_library(base, library, tasks, methods=rows, **options)
    assert len(measured) == 3
    for row in rows:
        alone = evaluate_library(base, library, tasks, methods=[row], **options)
        name = row if isinstance(row, str) else row["name"]
        assert alone.methods[name].values("loss") == after.methods[name].values("loss"), name


def test_several_libraries(base, tokenizer, tmp_path):
    both = {"one": random_library(tmp_path / "one"), "two": random_library(tmp_path / "two", ("a", "d"))}
    report = evaluate_library(base, both, two_tasks(), methods=["arrow"], tokenizer=tokenizer, **QUICK)
    names = list(report.methods)
    assert names[0] == "base" and "one/arrow" in names and "two/arrow" in names and "one/base" not in names
    assert report.reference("two/arrow", "uniform") == "two/uniform" and report.reference("base", "base") is None
    assert report.evaluations("two") and {figure.method for figure in report.evaluations("two")} >= {
        "arrow",
        "uniform",
    }
    with pytest.raises(ValueError, match="no '/'"):
        evaluate_library(base, {"a/b": both["one"]}, two_tasks(), tokenizer=tokenizer)


def test_the_report_in_every_form(base, tokenizer, library, tmp_path):
    report = evaluate_library(
        base, library, two_tasks(), methods=["arrow"], tokenizer=tokenizer, output_dir=tmp_path / "out", **QUICK
    )
    again = EvaluationReport.from_json(tmp_path / "out/report.json")
    assert again.table() == report.table() and again.to_markdown() == report.to_markdown()
    assert (tmp_path / "out/report.md").read_text() == report.to_markdown()
    assert "| arrow |" in report.to_markdown() and "no difference" in report.table()
    assert "12 judged rows of 2 tasks" in report.table() and "standard deviation over 3 seeds" in report.table()
    described = library.describe(evaluation=report.evaluations())
    described.save_pretrained(tmp_path / "described")
    card = (tmp_path / "described/README.md").read_text()
    assert "the base model without adapters" in card and "arrow" in card and "mean over 2 tasks" in card
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "out/report.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        EvaluationReport.from_json(tmp_path / "out/report.json")


def files_in(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "results").glob("*.json")}


def test_a_second_run_judges_only_what_is_new(base, tokenizer, library, tmp_path, monkeypatch):
    options = {"tokenizer": tokenizer, "output_dir": tmp_path / "out", **QUICK}
    first = evaluate_library(base, library, two_tasks(), methods=["arrow"], **options)
    before = files_in(tmp_path / "out")
    second = evaluate_library(base, library, two_tasks(), methods=["arrow", "spectr"], **options)
    after = files_in(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert sorted(name.split("-")[0] for name in after if name not in before) == ["spectr", "spectr"]
    assert second.methods["arrow"].values("loss") == first.methods["arrow"].values("loss")
    monkeypatch.setattr(ArrowLoraModel, "from_pretrained", None)  # a third run needs no routed model
    evaluate_library(base, library, two_tasks(), methods=["arrow", "spectr"], **options)


def test_a_report_of_something_else_is_refused(base, tokenizer, library, tmp_path):
    options = {"tokenizer": tokenizer, "output_dir": tmp_path / "out", "controls": False, **QUICK}
    evaluate_library(base, library, two_tasks(), methods=["arrow"], **options)
    other = library.select(["b", "a", "c"])
    with pytest.raises(ValueError, match="holds a report about something else: libraries"):
        evaluate_library(base, other, two_tasks(), methods=["arrow"], **options)
    with pytest.raises(ValueError, match="something else: tasks a, b differ"):
        evaluate_library(base, library, two_tasks(5), methods=["arrow"], **options)
    with pytest.raises(ValueError, match="something else: base base differ"):
        evaluate_library(pico_base(seed=1), library, two_tasks(), methods=["arrow"], **options)
    report = evaluate_library(base, other, two_tasks(), methods=["arrow"], overwrite=True, **options)
    assert report.data["libraries"][""]["experts"] == ["b", "a", "c"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; it must be a folder"):
        evaluate_library(base, library, two_tasks(), tokenizer=tokenizer, output_dir=tmp_path / "file")


def test_the_same_library_elsewhere_is_the_same(base, tokenizer, library, tmp_path):
    options = {"tokenizer": tokenizer, "output_dir": tmp_path / "out", "controls": False, **QUICK}
    evaluate_library(base, library, two_tasks(), methods=["arrow"], **options)
    library.save_pretrained(tmp_path / "moved")
    before = files_in(tmp_path / "out")
    moved = AdapterLibrary.from_pretrained(tmp_path / "moved")
    evaluate_library(base, moved, two_tasks(), methods=["arrow"], **options)
    assert files_in(tmp_path / "out") == before


def test_changed_weights_are_another_library(base, tokenizer, library, tmp_path):
    options = {"tokenizer": tokenizer, "output_dir": tmp_path / "out", "controls": False, **QUICK}
    evaluate_library(base, library, two_tasks(), methods=["arrow"], **options)
    tensors = {key: tensor * 1.5 for key, tensor in library["a"].tensors.items()}
    changed = AdapterLibrary({**library, "a": replace(library["a"], tensors=tensors)}, "my-base")
    with pytest.raises(ValueError, match="something else: libraries"):
        evaluate_library(base, changed, two_tasks(), methods=["arrow"], **options)


@pytest.mark.slow
def test_a_killed_run_goes_on(base, tokenizer, tmp_path):
    command = [sys.executable, "-m", "tests.evaluation.kill_runner", str(tmp_path / "adapters"), str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if len(list((tmp_path / "out/results").glob("*.json"))) >= 6:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    kept = files_in(tmp_path / "out")
    library = AdapterLibrary.from_pretrained({name: tmp_path / "adapters" / name for name in "abc"}, "my-base")
    options = {"methods": ["arrow"], "tokenizer": tokenizer}
    resumed = evaluate_library(base, library, two_tasks(20), output_dir=tmp_path / "out", **options)
    after = files_in(tmp_path / "out")
    assert {name: after[name] for name in kept} == kept and len(after) > len(kept)
    whole = evaluate_library(base, library, two_tasks(20), **options)
    for name in whole.methods:
        for key in whole.measures:
            ours, theirs = (one.methods[name].values(key) for one in (resumed, whole))
            assert {task: pytest.approx(rows, abs=1e-4) for task, rows in theirs.items()} == ours


def test_a_damaged_result_is_judged_again(base, tokenizer, library, tmp_path):
    options = {"methods": ["arrow"], "controls": False, "tokenizer": tokenizer, "output_dir": tmp_path, **QUICK}
    first = evaluate_library(base, library, {"a": two_tasks()["a"]}, **options)
    (file,) = (tmp_path / "results").glob("arrow-*.json")
    file.write_text(file.read_text()[:50])
    again = evaluate_library(base, library, {"a": two_tasks()["a"]}, **options)
    assert again.methods["arrow"].values("loss") == first.methods["arrow"].values("loss")
    assert json.loads(file.read_text())["value"]["values"]["loss"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"methods": ["arow"]}, ValueError, "'arow', which is unknown; allowed are 'base', 'uniform_parameter'"),
        ({"methods": ["pinned"]}, ValueError, "'pinned', which is unknown"),
        ({"methods": ["arrow", "arrow"]}, ValueError, "holds 'arrow' twice; give one of them another 'name'"),
        ({"methods": [{"top_k": 2}]}, ValueError, "dicts with either 'router' or 'experts'"),
        ({"methods": [{"experts": "z"}]}, ValueError, "expert 'z' is not in the library"),
        ({"methods": [{"experts": "a", "top_k": 1}]}, ValueError, "not with 'top_k'"),
        ({"methods": [{"router": "arrow", "name": "x/y"}]}, ValueError, "a name has no '/'"),
        ({"methods": [], "controls": False}, ValueError, "methods is empty"),
        ({"seeds": 0}, ValueError, "seeds=0 is not allowed; it is a whole number of at least 1"),
        ({"generate": 1}, ValueError, "generate=1 is not allowed; it is True or False"),
        ({"topk": 3}, TypeError, "unknown argument 'topk'; allowed are controls, top_k"),
        ({"selection": {"z": []}}, ValueError, "selection names the task 'z'"),
        ({"base_model_kwargs": {"dtype": "auto"}}, ValueError, "goes with a base given by name"),
        ({"tokenizer": None}, ValueError, "tokenizer is missing, and the base has no name"),
    ],
)
def test_bad_arguments(base, tokenizer, library, options, error, message):
    with pytest.raises(error, match=message):
        evaluate_library(base, library, two_tasks(), **{"tokenizer": tokenizer, **options})


def test_unequal_ranks_have_no_mean_of_factors(base, tokenizer, adapter_folders):
    library = AdapterLibrary.from_pretrained(adapter_folders, "my-base")
    with pytest.raises(ValueError, match="'uniform_parameter' averages A and B, so it needs one rank a module"):
        evaluate_library(
            base, library, two_tasks(), methods=["uniform_parameter"], controls=False, tokenizer=tokenizer, **QUICK
        )


def test_prompts_that_do_not_fit(base, tokenizer, library):
    long = {"t": [{"prompt": "short", "completion": "x"}, {"prompt": "p" * 300, "completion": "x"}]}
    with pytest.raises(ValueError, match="task 't', row 1 has 302 tokens .* context has 256; truncate=True cuts"):
        evaluate_library(base, library, long, tokenizer=tokenizer)
    nearly = {"t": [{"prompt": "p" * 250, "completion": "x"}]}
    with pytest.raises(ValueError, match="row 0 has 250 tokens, and the model's context has room for 192"):
        evaluate_library(base, library, nearly, tokenizer=tokenizer)
    evaluate_library(base, library, nearly, methods=["base"], controls=False, generate=False, tokenizer=tokenizer)
    report = evaluate_library(base, library, long, methods=["arrow"], truncate=True, tokenizer=tokenizer, **QUICK)
    assert "1 prompts of 't' were cut on the left" in report.table()


class Fussy:
    """Fails on one answer in three."""

    name = "fussy"
    calls = 0

    def compute(self, *, predictions, references):
        self.calls += 1
        if self.calls % 3 == 0:
            raise KeyError("no")
        return {"fussy": 0.5}


def test_a_metric_that_fails_on_an_example(base, tokenizer, library):
    tasks = {"t": random_rows("t", "eval", 6, 0)}
    report = evaluate_library(
        base, library, tasks, methods=["arrow"], metrics=["exact_match", Fussy()], tokenizer=tokenizer, **QUICK
    )
    values = report.methods["arrow"].values("fussy")["t"]
    assert values.count(None) == 2 and report.mean("arrow", "fussy") == 0.5
    assert any("Metric 'fussy' failed on 2 rows of 't'" in line for line in report.what_to_look_at())
    assert report.difference("arrow", "base", "fussy").rows == 4


def test_empty_generations_score_nothing_and_are_told(base, tokenizer, library):
    tasks = {"t": Task("t", random_rows("t", "eval", 3, 0), until=("",))}  # every answer ends before it begins
    report = evaluate_library(base, library, tasks, methods=["arrow"], tokenizer=tokenizer, **QUICK)
    assert report.mean("arrow", "exact_match") == report.mean("arrow", "rouge_l") == 0.0
    assert any("All generated answers are empty" in line for line in report.what_to_look_at())
