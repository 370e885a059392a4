"""What a report says to someone who does not know: a planted bad router, a planted leak; and nothing of clean ones.

The experts of the leak tests are pico adapters that are trained for real, to know random answers by heart.
"""

from __future__ import annotations

import random

import pytest
import torch

from peft_arrow import AdapterLibrary, evaluate_library
from peft_arrow.evaluation.leaks import find_leaks, is_blind
from peft_arrow.routers import ROUTERS, Router
from tests.evaluation.made import random_library, random_rows, teachable_base, trained_adapter, two_tasks


ROWS, STEPS = 16, 60
QUICK = {"generate": False, "draws": 200}


class AlwaysFirst(Router):
    """A bad router: the first expert, whatever the token."""

    name = "always_first"

    def score(self, layer) -> torch.Tensor:
        """Router logits, float32 (T, E)."""
        logits = torch.zeros(layer.x_TI.shape[0], layer.num_experts)
        logits[:, 0] = 100.0
        return logits


class ByModule(Router):
    """A worse one to see: another expert in each module, but always the same there."""

    name = "by_module"

    def score(self, layer) -> torch.Tensor:
        """Router logits, float32 (T, E)."""
        logits = torch.zeros(layer.x_TI.shape[0], layer.num_experts)
        logits[:, sum(layer.module.encode()) % layer.num_experts] = 100.0
        return logits


def findings(report):
    return "\n".join(report.what_to_look_at())


def test_a_bad_router_is_named(base, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(ROUTERS, "always_first", AlwaysFirst)
    monkeypatch.setitem(ROUTERS, "by_module", ByModule)
    report = evaluate_library(
        base,
        random_library(tmp_path),
        two_tasks(),
        methods=["arrow", "always_first", "by_module"],
        tokenizer=tokenizer,
        **QUICK,
    )
    told = findings(report)
    assert "always_first gives 100 % of the routing weight to expert 'a': it is one expert for everything" in told
    assert "by_module routes all tasks alike: in no layer do the experts' shares differ by more than 0.0" in told
    assert "always_first routes all tasks alike" in told
    assert "arrow gives" not in told and "arrow routes all" not in told and "random routes all" not in told
    assert "always_first is not better in loss than" in told or "always_first has a higher loss than" in told
    assert "Fewer than 30 judged rows, so intervals are rough: 'a', 'b'." in told
    assert "always_first" in report.table().split("Where the tokens went")[1]


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Three clean experts, and two of task `a` that saw the judged rows: those alone, and beside the training rows."""
    folder = tmp_path_factory.mktemp("trained")
    tasks = {name: random_rows(name, "train", ROWS, 0) + random_rows(name, "eval", ROWS, 0) for name in "abc"}
    folders = {
        name: trained_adapter(folder / name, [row for row in rows if row["split"] == "train"], steps=STEPS)
        for name, rows in tasks.items()
    }
    judged = [row for row in tasks["a"] if row["split"] == "eval"]
    folders["leaked"] = trained_adapter(folder / "leaked", judged, steps=STEPS)
    folders["both"] = trained_adapter(folder / "both", tasks["a"], steps=2 * STEPS)
    return tasks, folders


def report_on(experts, names, tokenizer, **options):
    tasks, folders = experts
    library = AdapterLibrary.from_pretrained({name: folders[name] for name in names}, "my-base")
    return evaluate_library(
        teachable_base(), library, tasks, methods=["arrow"], tokenizer=tokenizer, **QUICK, **options
    )


def test_clean_experts_raise_no_alarm(experts, tokenizer):
    report = report_on(experts, "abc", tokenizer)
    alone = report.data["libraries"][""]["alone"]
    assert sum(alone["a"]["a"]["selection"]) < 0.5 * sum(alone["a"]["a"]["judged"]), "the experts know their rows"
    assert "leak" not in findings(report)


def test_a_leak_is_named(experts, tokenizer):
    told = findings(report_on(experts, ["a", "b", "c", "leaked"], tokenizer))
    assert told.count("Possible leak") == 1
    assert "Possible leak: expert 'leaked' is better on the judged rows of 'a'" in told


def test_a_leak_of_an_own_expert_is_named(experts, tokenizer):
    """It knows the training rows as well as the judged ones; the others know their training rows only."""
    told = findings(report_on(experts, ["both", "b", "c"], tokenizer, oracle={"a": "both"}))
    assert told.count("Possible leak") == 1
    assert "Possible leak: expert 'both' is as good on the judged rows of 'a'" in told


def test_a_leak_into_a_random_expert_is_named_even_if_it_is_nobodys_own(experts, tokenizer):
    tasks, folders = experts
    library = AdapterLibrary.from_pretrained({"x": folders["b"], "y": folders["leaked"]}, "my-base")
    report = evaluate_library(
        teachable_base(), library, {"a": tasks["a"]}, methods=["arrow"], tokenizer=tokenizer, **QUICK
    )
    assert "expert 'y' is better on the judged rows of 'a'" in findings(report)


def test_repeated_rows_are_named(base, tokenizer, tmp_path):
    rows = random_rows("a", "eval", 4, 0)
    tasks = {"a": rows + [{**row, "split": "train"} for row in rows[:3]]}
    report = evaluate_library(
        base,
        random_library(tmp_path),
        tasks,
        methods=["centroid"],
        fit_data=dict.fromkeys("abc", rows[2:]),
        tokenizer=tokenizer,
        **QUICK,
    )
    told = findings(report)
    assert "3 of 4 judged rows of 'a' are also among its rows for training." in told
    assert "2 judged rows are also among the rows that routers were fitted on." in told


def test_without_rows_for_selection_the_report_says_what_it_cannot_see(base, tokenizer, tmp_path):
    library = random_library(tmp_path)
    report = evaluate_library(base, library, {"t": random_rows("t", "eval", 3, 0)}, tokenizer=tokenizer, **QUICK)
    assert "nothing can be said on whether an expert was trained on the judged rows" in findings(report)
    few = evaluate_library(base, library, two_tasks(2), tokenizer=tokenizer, **QUICK)
    assert "too few rows to see whether an expert was trained on the judged ones" in findings(few)


def made_up_losses(rng, *, gap, spread, count=16, experts=6):
    """Losses of clean experts on their own and the others' tasks; rows differ in difficulty for all alike."""
    names = [f"e{number}" for number in range(experts)]
    hard = {
        task: {part: [rng.uniform(1, 4) for _ in range(count)] for part in ("selection", "judged")} for task in names
    }
    alone = {"": hard}
    for expert in names:
        alone[expert] = {}
        for task in names:
            gains = {"selection": 1.5 + gap, "judged": 1.5} if task == expert else {"selection": 0.1, "judged": 0.1}
            alone[expert][task] = {
                part: [max(loss - rng.gauss(gains[part], spread), 0.01) for loss in hard[task][part]] for part in gains
            }
    return alone, {name: name for name in names}


@pytest.mark.parametrize("gap", [0.0, 0.3])
def test_false_alarms_are_rare(gap):
    """Thirty-six pairs of expert and task a report; the bound is one report in a hundred for the first sign."""
    rng = random.Random(0)
    better = without = 0
    for _ in range(150):
        leaks = find_leaks(*made_up_losses(rng, gap=gap, spread=0.6))
        better += any(leak.is_better for leak in leaks)
        without += any(not leak.is_better for leak in leaks)
    assert better <= 4 and without <= 8, (better, without)


def test_is_blind():
    losses = {"t": {"selection": [1.0] * 3, "judged": [1.0] * 3}}
    assert is_blind({"": losses, "a": losses}) and is_blind({})
    losses = {"t": {"selection": [1.0] * 8, "judged": [1.0] * 8}}
    assert not is_blind({"": losses, "a": losses})


def test_an_own_expert_that_does_not_help_is_named(base, tokenizer, tmp_path):
    report = evaluate_library(base, random_library(tmp_path), two_tasks(), tokenizer=tokenizer, **QUICK)
    told = findings(report)
    assert "On 'a' its own expert 'a' is" in told and "choosing experts cannot help here" in told
