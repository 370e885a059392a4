"""`--data hub`: the datasets' rows become the suites' rows; `load_dataset` is replaced, no Hub is asked."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from tests.pico import pico_tokenizer


PROMPT = (
    "Definition: Answer the riddle.\n\nPositive Example 1 -\nInput: What is up?\nOutput: Sky\n\n"
    "Now complete the following example -\nInput: {}\nOutput:"
)
ARC = {"question": "Why?", "choices": {"text": ["so", "no"], "label": ["A", "B"]}, "answerKey": "B"}
BENCHMARKS = {
    "google/boolq": {"passage": "It rains.", "question": "is it wet", "answer": True},
    "allenai/openbookqa": {**ARC, "question_stem": "Because"},
    "allenai/ai2_arc": ARC,
    "baber/piqa": {"goal": "open it", "sol1": "push", "sol2": "pull", "label": 1},
    "allenai/winogrande": {"sentence": "The _ fell.", "option1": "cup", "option2": "sun", "answer": "1"},
    "openai/openai_humaneval": {
        "task_id": "HumanEval/0",
        "prompt": "def one():\n",
        "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
        "entry_point": "one",
    },
    "google-research-datasets/mbpp": {
        "task_id": 2,
        "prompt": "Write a function that returns two.",
        "code": "def two():\n  return 2",
        "test_imports": ["import math"],
        "test_list": ["assert two() == 2", "assert math.isclose(two(), 2)"],
    },
    "Rowan/hellaswag": {"activity_label": "Fishing", "ctx": "He", "endings": ["a", "b", "c", "d"], "label": "2"},
}


@pytest.fixture
def hub(monkeypatch):
    """A Hub of made-up datasets; returns the ids that were asked for."""
    from steps import hub

    asked = []

    def load(source, config=None, split=None):
        asked.append(source)
        if source in BENCHMARKS:
            return Dataset.from_list([BENCHMARKS[source]] * 3)
        rows = [
            {"input": PROMPT.format(f"riddle {place}"), "output": [f"answer {place}"], "id": str(place)}
            for place in range(10)
        ]
        rows.append({"input": PROMPT.format("long " * 60), "output": ["x"], "id": "10"})
        rows.append(rows[0])
        return {"train": Dataset.from_list(rows)}

    monkeypatch.setattr(hub, "load_dataset", load)
    return asked


def test_suites_are_written_once_in_the_form_that_is_read(tmp_path, hub):
    from steps.data import read_suites
    from steps.hub import fetch

    suites = read_suites(fetch(tmp_path, pico_tokenizer()))
    assert (len(suites.upstream), len(suites.judged["sni"]), len(suites.judged["benchmarks"])) == (29, 12, 7)
    task = suites.upstream[0]
    rows = suites.train[task] + suites.judged["upstream"][task]
    assert sorted(row["input"] for row in rows) == sorted(f"riddle {place}" for place in range(10)), (
        "no long or double row"
    )
    assert {row["instruction"] for row in rows} == {"Answer the riddle."} and rows[0]["output"].startswith("answer")
    gold = {name: part[0]["options"][part[0]["gold"]] for name, part in suites.judged["benchmarks"].items()}
    assert gold == {
        "boolq": "yes",
        "openbookqa": "no",
        "arc_easy": "no",
        "arc_challenge": "no",
        "piqa": "pull",
        "winogrande": "cup fell.",
        "hellaswag": "c",
    }
    count = len(hub)
    fetch(tmp_path, pico_tokenizer())
    assert len(hub) == count, "nothing is fetched twice"


def test_code_problems_are_those_that_are_read(tmp_path, hub):
    from steps.code import humaneval, mbpp
    from steps.hub import fetch

    folder = fetch(tmp_path, pico_tokenizer()) / "heldout_benchmarks"
    for name, read in (("humaneval", humaneval), ("mbpp", mbpp)):
        problem = read(json.loads((folder / f"{name}.jsonl").read_text().splitlines()[0]))
        exec(problem.program(problem.solution), {})
        with pytest.raises(AssertionError):
            exec(problem.program("\n    return 3" if name == "humaneval" else "\n  return 3"), {})


def test_another_form_is_an_error_and_leaves_no_file(tmp_path, hub, monkeypatch):
    from steps import hub as module

    monkeypatch.setattr(
        module, "load_dataset", lambda *args, **more: {"train": Dataset.from_list([{"input": "Hi", "output": "x"}])}
    )
    with pytest.raises(ValueError, match="has a prompt of another form: 'Hi'"):
        module.fetch(tmp_path, pico_tokenizer())
    assert not list(tmp_path.rglob("*.jsonl"))


def test_task_list_is_of_the_data_as_described():
    from steps.hub import TASKS_FILE

    listed = json.loads(TASKS_FILE.read_text())
    assert (len(listed["train_suite"]), len(listed["heldout_sni"])) == (29, 12)
    assert sum(name.startswith("near") for name in listed["heldout_sni"].values()) == 6
