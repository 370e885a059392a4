"""Intervals, claims, the choosing split and the docs page: numbers planted here, formulas written apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats


DOCS = Path(__file__).parents[2] / "docs"


def rows(rng, tasks: int, count: int, mean: float = 0.0, spread: float = 1.0) -> dict[str, list[float]]:
    return {f"task{place}": list(rng.normal(mean, spread, count)) for place in range(tasks)}


def test_interval_is_that_of_the_tasks_means():
    """With many rows a task, only the tasks' own spread is left: the interval is that of a mean of 40 numbers."""
    from report.numbers import estimate

    rng = np.random.default_rng(1)
    centres = rng.normal(2.0, 1.0, 40)
    values = {f"task{place}": list(rng.normal(centre, 0.1, 50)) for place, centre in enumerate(centres)}
    found = estimate(values)
    means = np.array([np.mean(part) for part in values.values()])
    error = means.std(ddof=1) / np.sqrt(40)
    assert found["mean"] == pytest.approx(means.mean(), abs=1e-4) and (found["tasks"], found["items"]) == (40, 2000)
    assert found["low"] == pytest.approx(means.mean() - 1.96 * error, abs=0.25 * error)
    assert found["high"] == pytest.approx(means.mean() + 1.96 * error, abs=0.25 * error)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    from report.numbers import estimate

    hits = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        centres = rng.normal(0.0, 1.0, 20)
        found = estimate({f"task{place}": list(rng.normal(centre, 1.0, 6)) for place, centre in enumerate(centres)})
        hits += found["low"] < 0 < found["high"]
    assert hits / 60 > 0.85


def test_every_task_has_the_same_weight_whatever_its_rows():
    from report.numbers import estimate

    assert estimate({"long": [1.0] * 100, "short": [3.0]})["mean"] == 2.0


def test_gaps_are_of_the_rows_that_both_have():
    from report.numbers import gaps

    assert gaps({"a": [3.0, 5.0, 9.0], "b": [1.0]}, {"a": [1.0, 1.0]}) == {"a": [2.0, 4.0]}


def test_correlation_is_pearsons():
    from report.numbers import correlation

    rng = np.random.default_rng(2)
    x = rng.normal(size=40)
    y = 0.6 * x + rng.normal(size=40)
    found = correlation(x, y)
    assert found["mean"] == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-3)
    low, high = stats.pearsonr(x, y).confidence_interval(0.95)
    assert found["low"] == pytest.approx(low, abs=0.12) and found["high"] == pytest.approx(high, abs=0.12)


def judged(**losses):
    """Methods with planted mean losses on held-out tasks, and the same noise."""
    rng = np.random.default_rng(3)
    noise = rows(rng, 12, 10, spread=0.05)
    return {
        name.replace("__", "/").replace("_", "-"): {
            "sni": {task: [mean + value for value in part] for task, part in noise.items()}
        }
        for name, mean in losses.items()
    }


def verdict(claims, text):
    return next(told["verdict"] for told in claims if told["claim"] == text and told["suite"] == "sni")


def test_claims_hold_are_reversed_or_open_as_planted():
    from report.claims import judge_claims

    runs = judged(base=3.0, private__uniform_parameter=2.0, private__arrow_parameter=2.5, mbc__uniform_parameter=1.0)
    found = judge_claims(runs, {}, {})
    assert verdict(found, "base < private-uniform") == "held"
    assert verdict(found, "private-uniform < private-Arrow") == "reversed"
    assert verdict(found, "random tasks < MBC") == "not run"
    gain = next(told["gain"] for told in found if told["claim"] == "base < private-uniform" and told["suite"] == "sni")
    assert gain["mean"] == pytest.approx(1.0, abs=1e-6)
    rng = np.random.default_rng(4)
    runs["private/uniform-parameter"]["sni"] = rows(rng, 12, 10, mean=3.0)
    runs["base"]["sni"] = rows(rng, 12, 10, mean=3.0)
    assert verdict(judge_claims(runs, {}, {}), "base < private-uniform") == "open"


@pytest.mark.parametrize(("arrow", "told"), [(1.1, "held"), (1.5, "reversed")])
def test_near_is_a_tenth_of_what_is_gained_over_the_base(arrow, told):
    """Uniform gains 2 over the base, so near is within 0.2."""
    from report.claims import judge_claims

    runs = judged(base=3.0, mbc__uniform_parameter=1.0, mbc__arrow_parameter=arrow)
    assert verdict(judge_claims(runs, {}, {}), "MBC-uniform near MBC-Arrow") == told


def test_winner_is_chosen_and_reported_on_other_tasks():
    """The candidate that is best on choosing tasks alone is chosen, and its margin is that of the others."""
    from report.beyond import beyond, split_tasks

    tasks = [f"sni.task{place}" for place in range(12)]
    choosing, reporting = split_tasks(tasks)
    assert sorted(choosing + reporting) == sorted(tasks) and not set(choosing) & set(reporting)
    runs = judged(mbc__arrow=2.0, mbc__norm=1.9, mbc__lag=2.0, mbc__oracle=0.1)
    lag = runs["mbc/lag"]["sni"]
    for task in lag:
        shift = -0.5 if f"sni.{task}" in choosing else 0.3
        lag[task] = [value + shift for value in lag[task]]
    found = beyond(runs, "mbc")
    assert found["winner"] == found["winner_without_rows"] == "lag"
    assert found["tasks"] == {"choosing": 6, "reporting": 6, "held_out": 6}
    row = next(row for row in found["rows"] if row["name"] == "lag")
    assert row["reporting_gain"]["mean"] == pytest.approx(-0.3, abs=1e-6)
    assert {row["name"] for row in found["rows"]} == {"arrow", "norm", "lag"}, "the oracle is told the task"


def test_winner_over_two_libraries_is_judged_by_their_mean():
    """A router that is best on one library and bad on the other is not chosen; nor is what one of them lacks."""
    from report.beyond import beyond

    planted = {"arrow": (2.0, 2.0), "norm": (1.9, 1.7), "centroid": (1.0, 3.0), "task_predictor": (1.2, 1.2)}
    runs = {}
    for name, losses in planted.items():
        for library, loss in zip(("private", "mbc"), losses):
            runs |= judged(**{f"{library}__{name}": loss})
    runs = {name.replace("task-predictor", "task_predictor"): run for name, run in runs.items()}
    runs |= judged(private__lag=0.1)
    found = beyond(runs, "private", "mbc")
    assert found["winner"] == "task_predictor" and found["winner_without_rows"] == "norm"
    rows = {row["name"]: row for row in found["rows"]}
    assert rows.keys() == planted.keys() and rows["norm"]["reporting_gain"]["mean"] == pytest.approx(0.2, abs=1e-6)


def test_clusters_are_those_of_known_libraries():
    from report.results import clusters

    def run(own, held_out):
        return {"upstream": {"a": [own, own], "b": [own + 1]}, "sni": {"c": [held_out]}}

    runs = {"shared": run(2.0, 3.0), "private/oracle": run(1.0, 0.0), "private/uniform-parameter": run(4.0, 5.0)}
    few, many = clusters(runs, upstream=44, count=11)
    means = [[one["clusters"], *(one[key]["mean"] for key in ("told", "uniform", "held_out"))] for one in (few, many)]
    assert means == [[1, 2.5, 2.5, 3.0], [44, 1.5, 4.5, 5.0]]


def test_cost_of_a_larger_model_is_arithmetic():
    from report.costs import scale

    (row,) = scale({"train mbc-0, private": {"tokens": 44_000, "seconds": 10}, "judge": {"seconds": 5}})
    assert row["large_tokens"] == pytest.approx(256_000)
    assert row["large_flops"] == pytest.approx(4 * 7.24e9 * 256_000)
    assert row["large_hours"] == pytest.approx(4 * 7.24e9 * 256_000 / (0.4 * 312e12) / 3600)


def test_rounds_are_joined_and_written_answers_are_a_suite_of_their_own(tmp_path):
    """The same method and rows, judged by loss in one report and by Rouge-L in another; other seeds stay out."""
    from report.collect import read_judged

    def report(name, tasks):
        (tmp_path / "libraries" / name.rsplit("-", 2)[0]).mkdir(parents=True, exist_ok=True)
        cells = {task: {"values": values} for task, values in tasks.items()}
        methods = {"uniform_parameter": {"runs": [{"tasks": cells}]}}
        (tmp_path / "reports").mkdir(exist_ok=True)
        content = json.dumps({"libraries": {"": {"methods": methods}}})
        (tmp_path / "reports" / f"{name}.json").write_text(content)

    report("mbc-3-core-0", {"sni.a": {"loss": [1.0]}, "benchmarks.b": {"acc_paper": [1.0], "loss": [0.5]}})
    report("mbc-3-core-1", {"sni.a": {"loss": [2.0]}})
    report("mbc-3-generated-0", {"sni.a": {"loss": [9.0], "rouge_l": [0.25]}})
    report("mbc-0-core-0", {"sni.a": {"loss": [7.0]}})
    expected = {
        "sni": {"a": [1.0, 2.0]},
        "benchmarks": {"b": [1.0]},
        "answers": {"b": [0.5]},
        "generated": {"a": [0.25]},
    }
    assert read_judged(tmp_path, 3) == {"mbc/uniform-parameter": expected}


def planted(**losses):
    """Results of one seed, as a file has them."""
    from report.claims import judge_claims
    from report.results import beyond, methods, shared_lead

    runs = judged(**losses)
    return {
        "shared_lead": shared_lead(runs),
        "methods": methods(runs, {f"task{place}": "near" if place < 6 else "far" for place in range(12)}),
        "claims": judge_claims(runs, {}, {}),
        "beyond": {"mbc": beyond(runs, "mbc")} if "mbc__lag" in losses else {},
    }


def test_each_seed_has_its_verdict():
    """What holds with one seed and is reversed with the other is not averaged away."""
    from report.tables import claims, held_out

    seeds = {
        0: planted(base=3.0, private__uniform_parameter=2.0),
        7: planted(base=2.0, private__uniform_parameter=3.0),
    }
    (row,) = [
        line
        for line in claims(seeds).splitlines()
        if line.startswith("| base < private-uniform | 12 held-out tasks, loss")
    ]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2] == "✓" and cells[3].startswith("1.000 [") and cells[4] == "✗" and cells[5].startswith("-1.000 [")
    assert cells[6] == "12 / 120", "the items are the same with both seeds"
    (row,) = [line for line in held_out(seeds).splitlines() if line.startswith("| Private, uniform |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1].startswith("1.9") or cells[1].startswith("2.0")
    assert cells[2].startswith("3.0") or cells[2].startswith("2.9")


def test_other_seeds_report_and_do_not_choose():
    from report.analyses import beyond

    seeds = {
        0: planted(mbc__arrow=2.0, mbc__norm=1.9, mbc__lag=2.0),
        1: planted(mbc__arrow=2.0, mbc__norm=2.2, mbc__lag=1.0),
    }
    lines = beyond(seeds, "mbc").splitlines()
    assert "**norm**" in lines[2] and "-0.200 [" in lines[2] and "0.100 [" in lines[2]
    assert "**" not in "".join(lines[3:])


def test_budgets_stand_in_the_order_of_their_steps():
    """The lead of the shared LoRA is by how much less loss it has."""
    from report.analyses import NOT_RUN, budget

    few = planted(base=4.0, shared=1.5, private__arrow=2.0, private__oracle=1.0)
    many = planted(shared=1.0, private__arrow=0.9)
    files = {"budget-80-3": many | {"config": {"training": {"steps": 80}}}}
    files["budget-9-0"] = few | {"config": {"training": {"steps": 9}}}
    first, second = ([cell.strip() for cell in line.strip("|").split("|")] for line in budget(files).splitlines()[2:])
    assert first[:8] == ["held-out tasks", "9", "4.00", "1.50", "–", "2.00", "–", "1.00"]
    assert first[8].startswith("0.50 [") and first[10] == "0 / 12 / 120"
    assert second[1:4] == ["80", "–", "1.00"] and second[8].startswith("-0.10 [") and second[10].startswith("3 / ")
    assert budget({}) == NOT_RUN


def test_cost_of_poly_is_that_of_its_one_model(tmp_path):
    """The adapters that are made of it were not trained."""
    from report.collect import read_costs
    from steps.setting import Setting

    def record(name, steps):
        path = tmp_path / "libraries" / "poly-2-training" / name / "training.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"steps": steps, "tokens": 10 * steps, "seconds": 2.0}))

    record("poly", 7)
    record("experts/a", 0)
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "train-poly-2.json").write_text(json.dumps({"seconds": 3.0, "peak_mib": 5}))
    expected = {"experts": 1, "steps": 7, "tokens": 70, "seconds": 2, "peak_mib": 5}
    assert read_costs(Setting({}, tmp_path, tmp_path, 2)) == {"train poly-2, poly": expected}


def test_results_of_another_folder_are_not_lost(tmp_path):
    """Two machines may have worked on one seed; what only the docs know is not overwritten."""
    from report.page import write_docs
    from steps.setting import Setting

    docs = tmp_path / "docs"
    (docs / "results").mkdir(parents=True)
    kept = docs / "results" / "replication-1.json"
    kept.write_text(json.dumps({"methods": {"base": {}, "mbc/arrow": {}}}))
    (tmp_path / "results-1.json").write_text(json.dumps({"methods": {"base": {}}}))
    with pytest.raises(ValueError, match="tells of 'mbc/arrow'.*another folder"):
        write_docs(Setting({"name": "replication"}, tmp_path, tmp_path, 1), docs)
    assert "mbc/arrow" in kept.read_text()


def test_docs_page_says_what_its_results_files_say():
    """Nobody types a number: the page's tables are those that the script makes of the files beside it."""
    from report.page import BLOCKS, MARK, fill, pages

    for path in pages(DOCS):
        page = path.read_text(encoding="utf-8")
        assert fill(page, DOCS / "results") == page
    assert len(MARK.findall((DOCS / "replication.md").read_text(encoding="utf-8"))) > len(BLOCKS) - 3
