"""The plug-in of lm-evaluation-harness on a local task, against the harness's own model `hf` and against the judge."""

from __future__ import annotations

import json
import random
import runpy
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml

from peft_arrow import AdapterLibrary, ArrowLoraModel
from peft_arrow.evaluation.measures import choice_values
from peft_arrow.evaluation.rows import read_row
from peft_arrow.evaluation.scoring import score_options
from tests.pico import pico_adapter, pico_base


pytest.importorskip("lm_eval", reason="comes with the extra lm-eval")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from peft_arrow.evaluation.lm_eval_model import PeftArrowLM  # noqa: E402


ROOT = Path(__file__).parents[2]
MODULES = ["q_proj", "v_proj", "down_proj"]
OPTIONS = {"device": "cpu", "batch_size": 3}


def items() -> list[dict]:
    """Questions with two to four options of different lengths; some share their beginning, some are one character."""
    rng = random.Random(0)
    word = lambda low, high: "".join(rng.choices("abcdefgh ", k=rng.randint(low, high))).strip() or "a"  # noqa: E731
    found = []
    for number in range(12):
        options = [word(1, 9) for _ in range(2 + number % 3)]
        found.append({"question": f"Q: {word(3, 40)}\nA:", "choices": options, "answer": number % 2})
    return [*found, {"question": "Q: one\nA:", "choices": ["x", "y", "xx"], "answer": 2}]


# White space at the end of a context, and none at all, are where implementations part.
EDGES = [
    {"question": "Q: two \nA: ", "choices": ["no", "yes"], "answer": 1},
    {"question": "Q: three\n\n", "choices": ["abc", "d e", "f"], "answer": 0},
    {"question": "", "choices": ["ab", "ba"], "answer": 1},
]


def read_from(path: Path, rows: list[dict]) -> dict:
    """What a task's YAML says about rows that are written to that file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data_files": {"test": str(path)}, "cache_dir": str(path.parent / "cache")}
    return {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test", "doc_to_text": "{{question}}"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> TaskManager:
    """`pico_choice` and `pico_words`, read from YAML and JSON lines."""
    folder = tmp_path_factory.mktemp("tasks")
    choice = {
        **read_from(folder / "choice.jsonl", [*items(), *EDGES]),
        "task": "pico_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    words = {
        **read_from(folder / "words.jsonl", items()),
        "task": "pico_words",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (choice, words):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def places(tmp_path_factory, tokenizer) -> dict[str, str]:
    """A base with its tokenizer, two adapters and a library of both, as folders."""
    root = tmp_path_factory.mktemp("places")
    pico_base().save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for seed, name in enumerate(("one", "two"), 1):
        pico_adapter(root / name, seed=seed, r=4, target_modules=MODULES)
    AdapterLibrary.from_pretrained([root / "one", root / "two"], str(root / "base")).save_pretrained(root / "library")
    return {name: str(root / name) for name in ("base", "one", "two", "library")}


def run(model, tasks: TaskManager, name: str = "pico_choice", **options) -> tuple[list, list]:
    """What the harness got for each request of each item, and its records of the items, in order."""
    found = simple_evaluate(
        model=model, tasks=[name], task_manager=tasks, bootstrap_iters=0, log_samples=True, **options
    )
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples], samples


def flat(answers: list) -> torch.Tensor:
    return torch.tensor([float(answer[0]) for item in answers for answer in item], dtype=torch.float64)


@pytest.mark.parametrize("name", ["pico_choice", "pico_words"])
def test_one_expert_is_the_plain_adapter(tasks, places, name):
    """The same answers as the harness's own model gives with `peft=`."""
    arguments = f"base={places['base']},library={places['one']},router=arrow,top_k=1"
    found, _ = run("peft-arrow", tasks, name, model_args=arguments, **OPTIONS)
    plain, _ = run("hf", tasks, name, model_args=f"pretrained={places['base']},peft={places['one']}", **OPTIONS)
    bare, _ = run("hf", tasks, name, model_args=f"pretrained={places['base']}", **OPTIONS)
    assert plain != bare, "the adapter does nothing, so this test would show nothing"
    if name == "pico_words":
        assert found == plain
    else:
        torch.testing.assert_close(flat(found), flat(plain), atol=1e-4, rtol=0)


def test_library_saved_model_and_live_model_agree(tasks, places, tokenizer, tmp_path):
    arguments = {"base": places["base"], "library": places["library"], "router": "arrow", "top_k": 1}
    found, _ = run("peft-arrow", tasks, model_args=arguments, **OPTIONS)
    live = ArrowLoraModel.from_pretrained(pico_base(), [places["library"]], top_k=1)
    live.save_pretrained(tmp_path / "routed")
    saved, _ = run("peft-arrow", tasks, model_args=f"base={places['base']},routed_model={tmp_path}/routed", **OPTIONS)
    given, _ = run(PeftArrowLM(live, tokenizer=tokenizer, **OPTIONS), tasks)
    for other in (saved, given):
        torch.testing.assert_close(flat(other), flat(found), atol=1e-4, rtol=0)
    uniform, _ = run("peft-arrow", tasks, model_args={**arguments, "router": "uniform"}, **OPTIONS)
    assert (flat(uniform) - flat(found)).abs().max() > 1e-2


def test_one_model_of_the_harness_for_each_way_in(places):
    assert get_model("peft-arrow") is PeftArrowLM
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lm_eval.models"]["peft-arrow"].partition(":")
    assert getattr(import_module(module), name) is PeftArrowLM


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "library=None, routed_model=None is not allowed"),
        ({"library": "a", "routed_model": "b"}, "library='a', routed_model='b' is not allowed"),
        ({"routed_model": "b", "top_k": 2}, "top_k goes with library"),
        ({"library": "nowhere/at-all"}, "nowhere/at-all"),
        ({"library": "LIBRARY", "top_k": 0}, "top_k=0"),
        ({"library": "LIBRARY", "router": "best"}, "router='best'"),
    ],
)
def test_bad_arguments(places, options, message):
    options = {name: places["library"] if value == "LIBRARY" else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        PeftArrowLM(Path(places["base"]), **options, **OPTIONS)


@pytest.mark.slow  # the harness looks through all its own tasks first
def test_the_command_line(tasks, places, tmp_path, monkeypatch, capsys):
    """`python -m peft_arrow.evaluation.lm_eval` is the harness's command with one model more."""
    arguments = ["--model", "peft-arrow", "--tasks", "pico_choice", "--include_path", str(tasks.include_path)]
    arguments += ["--model_args", f"base={places['base']},library={places['library']},top_k=1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments, "--output_path", str(tmp_path)])
    runpy.run_module("peft_arrow.evaluation.lm_eval", run_name="__main__")
    results = json.loads(next(tmp_path.rglob("results_*.json")).read_text())
    assert (
        results["results"]["pico_choice"]["sample_len"] == len(items()) + len(EDGES)
        and "pico_choice" in capsys.readouterr().out
    )


@pytest.mark.parametrize("batch_size", [3, "auto"])
def test_an_option_has_no_say_in_who_scores_it(places, tokenizer, batch_size):
    """With granularity="sequence": each option's score is that of the LoRA chosen from the context's tokens alone."""
    model = ArrowLoraModel.from_pretrained(pico_base(), [places["library"]], top_k=1, granularity="sequence")
    requests = [(item["question"], option) for item in items() for option in item["choices"]]
    instances = [Instance("loglikelihood", {}, pair, 0) for pair in requests]
    harness = PeftArrowLM(model, tokenizer=tokenizer, device="cpu", batch_size=batch_size, max_batch_size=4)
    found = [answer[0] for answer in harness.loglikelihood(instances, disable_tqdm=True)]
    careless = [
        answer[0] for answer in HFLM(model, tokenizer=tokenizer, **OPTIONS).loglikelihood(instances, disable_tqdm=True)
    ]
    expected = []
    for context, option in requests:
        ids = tokenizer(context + option, return_tensors="pt")["input_ids"]
        length = len(tokenizer(context)["input_ids"])
        with torch.no_grad():  # the context first, then the option on its cache: the choice is made by then
            first = model(ids[:, :length], use_cache=True)
            rest = model(ids[:, length:], past_key_values=first.past_key_values).logits
        logits = torch.cat([first.logits[:, -1:], rest[:, :-1]], 1)[0]
        expected.append(logits.log_softmax(-1).gather(1, ids[0, length:, None]).sum().item())
    expected = torch.tensor(expected)
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=0)
    assert (torch.tensor(careless) - expected).abs().max() > 1e-2, "options decide nothing here: this shows nothing"


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_judge_scores_the_base_as_the_harness_does(tasks, places, tokenizer, batch_size):
    """To the item: the log-likelihood of each option, and both choices that are made of them."""
    arguments = {"model_args": f"pretrained={places['base']}", "device": "cpu", "batch_size": 3}
    answers, samples = run("hf", tasks, **arguments)
    rows = [
        read_row(
            {"input": item["question"], "options": item["choices"], "gold": item["answer"]}, "item", delimiter=" "
        )
        for item in [*items(), *EDGES]
    ]
    questions = [{"prompt": row.prompt, "options": row.continuations()} for row in rows]
    scores = score_options(pico_base(), tokenizer, questions, batch_size=batch_size)
    assert [len(item) for item in scores] == [len(item) for item in answers]
    found = torch.tensor([score.loglik for item in scores for score in item], dtype=torch.float64)
    torch.testing.assert_close(found, flat(answers), atol=1e-4, rtol=0)
    assert [[score.is_greedy for score in item] for item in scores] == [[bool(g) for _, g in item] for item in answers]
    for row, item, sample in zip(rows, scores, samples, strict=True):
        values = choice_values(row, item)
        assert (values["acc"], values["acc_norm"]) == (sample["acc"], sample["acc_norm"]), row
