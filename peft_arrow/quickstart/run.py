"""The quickstart: train, route, judge, answer, draw."""

import json
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
from ..tuner.trace_report import routing_html
from . import report
from .base import load_base, silence_known_warnings
from .judge import encode, files_fingerprint
from .methods import JudgeSettings, judge_methods
from .task_list import load_tasks
from .tasks import Row, Task
from .train import TrainSettings, train_adapters


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
    workers: int = 2,
) -> dict[str, Any]:
    """Route a base model between adapters and show what that is worth; the work of an earlier run is used again.

    Args:
        base (`str`, *optional*): folder or Hub id of a causal language model; by default SmolLM2-135M-Instruct.
        adapters (`Sequence[str]` or `Mapping[str, str]`, *optional*):
            References to adapters of `base`. They are routed as they are: nothing is trained and no table is made.
        output (`str` or `Path`): the folder for everything that is written.
        tasks (`Sequence[str]`, *optional*): names of quickstart tasks; by default all.
        prompts (`Sequence[str]`, *optional*): what to answer; by default a held-out prompt of each task.
        training (`TrainSettings`, *optional*): how the adapters are trained; its base is replaced by `base`.
        judging (`JudgeSettings`, *optional*): how the methods are compared.
        workers (`int`): processes that train, of one thread each.

    Returns:
        `dict`: the content of `report.json`: `methods` (per method and task `loss`, `exact`, `row_losses`) and more.
    """
    started = time.monotonic()
    silence_known_warnings()
    training, judging = training or TrainSettings(), judging or JudgeSettings()
    chosen, output = load_tasks(tasks), Path(output)
    output.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"settings": asdict(training) | asdict(judging) | {"base": base}, "fingerprint": None}
    if adapters is None:
        adapters = train_adapters(chosen, output / "adapters", replace(training, base=base), workers)
        result["methods"], result["best_single"] = judge_methods(chosen, adapters, output / "judged", base, judging)
        write_tables(result, output)
        result["fingerprint"] = files_fingerprint(list(adapters.values()), [result["settings"], list(prompts or ())])
    shown = earlier_answers(output, result["fingerprint"])
    result |= shown or answer_and_draw(base, adapters, chosen, prompts, judging, output)
    result["seconds"] = round(time.monotonic() - started, 1)
    (output / "report.json").write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    print(report.render_answers(result["answers"]))
    print("\nWritten:", *(f"  {path}" for path in sorted(output.iterdir())), sep="\n")
    print(f"Took {result['seconds']:.0f} s.")
    return result


def earlier_answers(output: Path, fingerprint: str | None) -> dict[str, Any]:
    """Answers and files of an earlier run with the same adapters, settings and prompts; empty if there are none."""
    path = output / "report.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if fingerprint and path.exists() else {}
    is_same = bool(stored) and stored.get("fingerprint") == fingerprint
    if not is_same or not all(Path(file).exists() for file in stored["files"]):
        return {}
    return {key: stored[key] for key in ("answers", "files")}


def answer_and_draw(
    base: str | None,
    adapters: Any,
    tasks: Sequence[Task],
    prompts: Sequence[str] | None,
    judging: JudgeSettings,
    output: Path,
) -> dict[str, Any]:
    """Answer one prompt of each task, or the given ones, in one batch, and draw where the tokens went."""
    rows = {f"prompt {number}": [Row(prompt, "", (), "")] for number, prompt in enumerate(prompts or (), 1)}
    rows = rows or {task.name: task.heldout_rows(judging.heldout) for task in tasks}
    model, tokenizer = load_base(base)
    routed = ArrowLoraModel.from_pretrained(model, adapters=adapters, top_k=judging.top_k)
    answers = answer_batch(routed, tokenizer, {name: rows[name][0] for name in rows})
    return {"answers": answers, "files": draw(routed, tokenizer, rows, output)}


def write_tables(result: Mapping[str, Any], output: Path) -> None:
    """Print the tables, and write them to `report.txt` and `report.md`."""
    text = report.render_text(result)
    (output / "report.txt").write_text(text + "\n", encoding="utf-8")
    (output / "report.md").write_text(report.render_markdown(result) + "\n", encoding="utf-8")
    print(f"\n{text}\n")


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
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: Mapping[str, Sequence[Row]], output: Path
) -> list[str]:
    """Two pictures of where each task's tokens went, and a page with the expert of each token of one row a task."""
    names = {name: output / name for name in ("experts_by_task.png", "experts_by_layer.png", "tokens.html")}
    shares = report.task_shares(model, tokenizer, {task: rows[task][:TRACED_ROWS] for task in rows})
    report.draw_by_task(shares, model.expert_names, names["experts_by_task.png"])
    report.draw_by_layer(shares, model.expert_names, names["experts_by_layer.png"])
    with model.trace_routing() as trace:
        model(**encode(tokenizer, [rows[task][0] for task in rows])[0], logits_to_keep=1)
    routing_html(trace, names["tokens.html"], tokenizer, labels=list(rows))
    return [str(path) for path in names.values()]
