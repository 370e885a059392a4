"""The data by Hub ids, for people who have the Hub: the tasks of Super-NaturalInstructions, and the benchmarks.

Of the 44 training tasks 29 are Super-NaturalInstructions, and so are the 12 held-out ones: each is a dataset of its
own, `Lots-of-LoRAs/<task>`, whose prompts hold the definition, examples and the input. Definition and input are taken
out of them, rows of more than `MOST` tokens are left out, and 400 and 100 are drawn. The other 15 tasks have no
dataset of that form, so that a library from the Hub has 29 tasks: another experiment, of the same kind.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import load_dataset
from tqdm import tqdm


OWNER = "Lots-of-LoRAs"
MOST = 160  # tokens of a row
COUNTS = {"train": 400, "eval": 100}
BENCHMARK_ROWS = 300
TASKS_FILE = Path(__file__).with_name("hub_tasks.json")
PROMPT = re.compile(
    r"Definition:\s*(?P<definition>.*?)\n\n"
    r".*Now complete the following example\s*-?\s*\nInput:\s*(?P<input>.*?)\nOutput:",
    re.DOTALL,
)
Row = Mapping[str, Any]


def fetch(folder: Path, tokenizer: Any) -> Path:
    """Write the three suites into a folder; a file that is there is not fetched again. Returns the folder.

    Raises:
        ValueError: a dataset has prompts of another form.
    """
    listed = json.loads(TASKS_FILE.read_text(encoding="utf-8"))
    todo = [(suite, task) for suite in ("train_suite", "heldout_sni") for task in listed[suite]]
    for suite, task in tqdm(todo, "fetching tasks", unit="task"):
        path = folder / suite / f"{task}.jsonl"
        if not path.exists():
            _write(path, _task_rows(task, listed[suite][task], tokenizer))
    for name, (source, config, split, convert) in tqdm(BENCHMARKS.items(), "fetching benchmarks", unit="benchmark"):
        path = folder / "heldout_benchmarks" / f"{name}.jsonl"
        if not path.exists():
            rows = load_dataset(source, config, split=split)
            chosen = random.Random(0).sample(range(len(rows)), min(BENCHMARK_ROWS, len(rows)))
            _write(path, [convert(rows[place]) for place in sorted(chosen)])
    return folder


def _task_rows(task: str, category: str, tokenizer: Any) -> list[Row]:
    source = f"{OWNER}/{task}"
    rows = [row for part in load_dataset(source).values() for row in part]
    found: dict[str, Row] = {}
    for row in rows:
        matched = PROMPT.search(row["input"] + ("" if row["input"].rstrip().endswith("Output:") else "\nOutput:"))
        if matched is None:
            raise ValueError(f"dataset {source!r} has a prompt of another form: {row['input'][:80]!r}.")
        output = row["output"] if isinstance(row["output"], str) else row["output"][0]
        made = {
            "task": task,
            "category": category,
            "instruction": matched["definition"].strip(),
            "input": matched["input"].strip(),
            "output": output,
        }
        text = f"{made['instruction']}\n\n{made['input']}\n{output}"
        if output.strip() and len(tokenizer(text)["input_ids"]) < MOST:
            found.setdefault(made["input"], made)
    kept = list(found.values())
    random.Random(f"0 {task}").shuffle(kept)
    share = COUNTS["eval"] / sum(COUNTS.values())
    evals = min(COUNTS["eval"], max(int(share * len(kept)), 1))
    splits = {"eval": kept[:evals], "train": kept[evals : evals + COUNTS["train"]]}
    return [{**row, "split": split} for split, part in splits.items() for row in part]


def _write(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    draft.replace(path)


def _choice(text: str, options: list[str], gold: int) -> Row:
    return {"input": text, "options": options, "gold": gold}


def _boolq(row: Row) -> Row:
    return _choice(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"], int(row["answer"]))


def _openbookqa(row: Row) -> Row:
    return _choice(row["question_stem"], row["choices"]["text"], row["choices"]["label"].index(row["answerKey"]))


def _arc(row: Row) -> Row:
    gold = row["choices"]["label"].index(row["answerKey"])
    return _choice(f"Question: {row['question']}\nAnswer:", row["choices"]["text"], gold)


def _piqa(row: Row) -> Row:
    return _choice(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"])


def _winogrande(row: Row) -> Row:
    start, _, end = row["sentence"].partition("_")
    return _choice(start.rstrip(), [f"{row[name]}{end}" for name in ("option1", "option2")], int(row["answer"]) - 1)


def _hellaswag(row: Row) -> Row:
    return _choice(f"{row['activity_label']}: {row['ctx']}", row["endings"], int(row["label"]))


def _humaneval(row: Row) -> Row:
    made = {"id": row["task_id"], "input": row["prompt"], "output": row["canonical_solution"], "options": None}
    return {**made, "test": row["test"], "entry_point": row["entry_point"]}


def _mbpp(row: Row) -> Row:
    told = {"id": f"mbpp/{row['task_id']}", "input": f"{row['prompt']}\n{row['test_list'][0]}", "options": None}
    setup = "\n".join(row["test_imports"])
    return {**told, "output": row["code"], "test_list": row["test_list"], "test_setup_code": setup}


BENCHMARKS: dict[str, tuple[str, str | None, str, Callable[[Row], Row]]] = {
    "boolq": ("google/boolq", None, "validation", _boolq),
    "openbookqa": ("allenai/openbookqa", "main", "test", _openbookqa),
    "piqa": ("baber/piqa", None, "validation", _piqa),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation", _winogrande),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test", _arc),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", _arc),
    "hellaswag": ("Rowan/hellaswag", None, "validation", _hellaswag),
    "humaneval": ("openai/openai_humaneval", None, "test", _humaneval),
    "mbpp": ("google-research-datasets/mbpp", "sanitized", "test", _mbpp),
}
