"""The quickstart: build a library, route it, judge, answer, draw."""

import functools
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .. import ArrowLoraModel
from ..library.library import AdapterLibrary
from . import pictures, report
from .base import load_base, silence_known_warnings
from .judge import encode, files_fingerprint
from .methods import JudgeSettings, Loaded, judge_methods
from .settings import Trained, TrainSettings
from .task_list import load_tasks
from .tasks import Row, Task
from .train import train_experts


TRACED_ROWS = 8
ANSWER_TOKENS = 24


def run_quickstart(
    base: str | None = None,
    adapters: Sequence[str] | Mapping[str, str] | None = None,
    output: str | Path = "quickstart_output",
    *,
    tasks: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    training: TrainSettings | None = None,
    judging: JudgeSettings | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Build a library from small tasks, route it, and show what that is worth; what an earlier run did is used again.

    Args:
        base (`str`, *optional*): folder or Hub id of a causal language model; by default SmolLM2-135M-Instruct.
        adapters (`Sequence[str]` or `Mapping[str, str]`, *optional*):
            References to adapters of `base`. They are routed as they are: nothing is trained and no table is made.
        output (`str` or `Path`): the folder for everything that is written; the library is in `library/`.
        tasks (`Sequence[str]`, *optional*): names of quickstart tasks; by default all.
        prompts (`Sequence[str]`, *optional*): what to answer; by default a held-out prompt of each task.
        training (`TrainSettings`, *optional*): of the library; with the given base, and at most one cluster a task.
        judging (`JudgeSettings`, *optional*): how the methods are compared.
        workers (`int`, *optional*): processes that train; by default 2 of one thread each on a CPU of two cores.

    Returns:
        `dict`: the content of `report.json`: `methods` (per method and task `loss`, `exact`, `row_losses`) and more.

    Raises:
        BuildFailed: the library could not be built.
    """
    started = time.monotonic()
    silence_known_warnings()
    chosen, output, judging = load_tasks(tasks), Path(output), judging or JudgeSettings()
    training = with_clusters(replace(training or TrainSettings(), base=base), len(chosen))
    output.mkdir(parents=True, exist_ok=True)
    loaded = functools.cache(lambda: load_base(base))
    result: dict[str, Any] = {"settings": asdict(training) | asdict(judging), "fingerprint": None}
    trained: Trained | None = None
    if adapters is None:
        trained = train_experts(chosen, output, training, workers, command_of(tasks, training))
        chosen, adapters = load_tasks(list(trained.private)), str(trained.library)
        measure(result, chosen, trained, output, loaded, judging)
        result["fingerprint"] = fingerprint_of(result, trained, prompts)
    shown = earlier_answers(output, result["fingerprint"])
    rows = answered_rows(chosen, prompts, judging)
    result |= shown or answer_and_draw(loaded, adapters, rows, own_experts(rows, trained), judging, output)
    result["seconds"] = round(time.monotonic() - started, 1)
    (output / "report.json").write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    print(f"\n{report.render_all(result, output)}")
    return result


def with_clusters(training: TrainSettings, tasks: int) -> TrainSettings:
    """The settings with at most as many clusters as tasks; "auto" has to have three tasks to choose from."""
    is_number = isinstance(training.clusters, int)
    few = tasks < training.clusters if is_number else tasks < 3
    return replace(training, clusters=tasks) if few else training


def fingerprint_of(result: Mapping[str, Any], trained: Trained, prompts: Sequence[str] | None) -> str:
    """Changes with all that decides answers and pictures."""
    return files_fingerprint(list(trained.experts.values()), [result["settings"], trained.groups, list(prompts or ())])


def command_of(tasks: Sequence[str] | None, training: TrainSettings) -> str:
    """The command that builds the same library, for its card; of a folder only the name is told."""
    base = training.base and (Path(training.base).name if Path(training.base).exists() else training.base)
    words = ["peft-arrow", "quickstart", *(["--base", base] if base else []), *(["--tasks", *tasks] if tasks else [])]
    return shlex.join([*words, "--steps", str(training.steps), "--clusters", str(training.clusters)])


def measure(
    result: dict[str, Any],
    tasks: Sequence[Task],
    trained: Trained,
    output: Path,
    loaded: Loaded,
    judging: JudgeSettings,
) -> None:
    """Compare the methods; put what was found into `result`, the reports and the library's card."""
    base = result["settings"]["base"]
    methods, best = judge_methods(tasks, trained, output / "judged", loaded, judging, base)
    result |= {"clusters": trained.groups, "silhouette": trained.silhouette, "steps": trained.steps}
    result |= {"methods": methods, "best_single": best}
    (output / "report.txt").write_text(report.render_text(result) + "\n", encoding="utf-8")
    (output / "report.md").write_text(report.render_markdown(result) + "\n", encoding="utf-8")
    library, found = AdapterLibrary.from_pretrained(trained.library), report.evaluations(result)
    if list(library.notes.evaluation) != found:
        library.describe(evaluation=found).save_pretrained(trained.library)


def earlier_answers(output: Path, fingerprint: str | None) -> dict[str, Any]:
    """Answers and files of an earlier run with the same adapters, settings and prompts; empty if there are none."""
    path = output / "report.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if fingerprint and path.exists() else {}
    is_same = bool(stored) and stored.get("fingerprint") == fingerprint
    if not is_same or not all(Path(file).exists() for file in stored["files"]):
        return {}
    return {key: stored[key] for key in ("answers", "files")}


def answered_rows(
    tasks: Sequence[Task], prompts: Sequence[str] | None, judging: JudgeSettings
) -> dict[str, list[Row]]:
    """The prompts that were given, or rows of each task: the first of each is answered, some are traced."""
    rows = {f"prompt {number}": [Row(prompt, "", (), "")] for number, prompt in enumerate(prompts or (), 1)}
    return rows or {task.name: task.heldout_rows(judging.heldout) for task in tasks}


def own_experts(rows: Mapping[str, Sequence[Row]], trained: Trained | None) -> dict[str, str]:
    """Task -> the expert of its cluster; empty for prompts and for adapters of the user's."""
    known = trained.private if trained else {}
    return {name: trained.cluster_of(name) for name in rows if name in known}


def answer_and_draw(
    loaded: Loaded,
    adapters: Any,
    rows: Mapping[str, Sequence[Row]],
    own: Mapping[str, str],
    judging: JudgeSettings,
    output: Path,
) -> dict[str, Any]:
    """Answer the first of each rows in one batch, and draw where the tokens went."""
    base, tokenizer = loaded()
    routed = ArrowLoraModel.from_pretrained(base, adapters=adapters, top_k=judging.top_k)
    answers = answer_batch(routed, tokenizer, {name: rows[name][0] for name in rows})
    return {"answers": answers, "files": draw(routed, tokenizer, rows, own, output)}


@torch.no_grad()
def answer_batch(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: Mapping[str, Row]
) -> dict[str, dict[str, str]]:
    """Greedy answers to all prompts in one left-padded batch: of the routed model and of the base."""
    batch = tokenizer([row.prompt for row in rows.values()], padding=True, padding_side="left", return_tensors="pt")
    options = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    texts = {}
    with tqdm(total=2, desc="answering", unit="batch") as bar:
        texts["arrow"] = _decode(tokenizer, model.generate(**batch, **options), batch)
        bar.update()
        with model.disable_adapter():
            texts["base"] = _decode(tokenizer, model.generate(**batch, **options), batch)
        bar.update()
    answers = {}
    for (name, row), arrow, plain in zip(rows.items(), texts["arrow"], texts["base"], strict=True):
        answers[name] = {"prompt": row.prompt, "expected": row.completion, "arrow": arrow, "base": plain}
    return answers


def _decode(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> list[str]:
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def draw(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Mapping[str, Sequence[Row]],
    own: Mapping[str, str],
    output: Path,
) -> list[str]:
    """Two pictures of where each task's tokens went, and a page with the expert of each token of one row a task."""
    names = {name: output / name for name in ("experts_by_task.png", "experts_by_layer.png", "tokens.html")}
    shares = pictures.task_shares(model, tokenizer, {task: rows[task][:TRACED_ROWS] for task in rows})
    pictures.draw_by_task(shares, model.expert_names, names["experts_by_task.png"], own)
    pictures.draw_by_layer(shares, model.expert_names, names["experts_by_layer.png"], own)
    with model.trace_routing(tasks=list(rows)) as trace:
        model(**encode(tokenizer, [rows[task][0] for task in rows])[0], logits_to_keep=1)
    trace.html(names["tokens.html"], tokenizer)
    return [str(path) for path in names.values()]
