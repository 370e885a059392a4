"""Supervised adaptation: held-out tasks, a share of their rows, each way to begin; judged by loss."""

from __future__ import annotations

import statistics
from typing import Any

from peft import PeftModel

from peft_arrow import adapt
from peft_arrow.evaluation.rows import read_row
from peft_arrow.evaluation.scoring import score_options

from .data import plain
from .setting import Setting


def adapt_one(setting: Setting, way: str, task: str, share: float) -> None:
    """Adapt to one task and keep the loss of each eval row."""
    model, tokenizer = setting.base
    options, library, seed = setting.config["adapting"], None, setting.seed
    method, source = options["methods"][way]
    if source is not None:
        library = setting.library(source)
    name = f"{way}-{task}-{share}-{seed}"
    more: dict[str, Any] = {"steps": options["shares"][share]["steps"]}
    if method == "lorahub":
        more |= options["lorahub"]
    if method == "scratch":
        more["lora_config"] = setting.lora()
    elif method != "lorahub":
        more["lora_config"] = {"lora_dropout": 0.0}
    if method == "arrow":
        more["rows"] = options["lorahub"]["rows"]
    ref = adapt(
        model,
        library,
        rows_of(setting, task, share, seed),
        method=method,
        output_dir=setting.root / "adapted" / name,
        name=task,
        tokenizer=tokenizer,
        init_seed=seed,
        sft_config=setting.sft(seed),
        progress=False,
        **more,
    )
    adapted = PeftModel.from_pretrained(model, ref.source).eval()
    try:
        losses = losses_on_eval(setting, adapted, task)
    finally:
        adapted.unload()
    told = {"way": way, "task": task, "share": share, "seed": seed, "losses": losses}
    setting.write(f"adapted-losses/{name}.json", told)


def losses_on_eval(setting: Setting, model: Any, task: str) -> list[float]:
    """Nats a token of the right answers."""
    _, tokenizer = setting.base
    judged = setting.suites.judged["sni"][task][: setting.config["adapting"]["eval_rows"]]
    rows = [read_row(row, f"{task}, row {place}") for place, row in enumerate(judged)]
    items = [{"prompt": row.prompt, "options": [row.completion]} for row in rows]
    return [round(options[0].mean_nll, 6) for options in score_options(model, tokenizer, items)]


def base_losses(setting: Setting) -> None:
    """The base alone on the same rows."""
    model, _ = setting.base
    found = {task: losses_on_eval(setting, model, task) for task in setting.suites.judged["sni"]}
    setting.write("adapted-losses/base.json", {"way": "base", "losses": found})


def rows_of(setting: Setting, task: str, share: float, seed: int) -> list[dict[str, Any]]:
    """A share of a task's training rows; a smaller share is part of a larger one."""
    rows = setting.suites.train[task]
    count = max(round(share * len(rows)), 1)
    places = sorted(range(len(rows)), key=lambda place: (place * 7919 + seed * 104729) % len(rows))[:count]
    return plain(rows[place] for place in sorted(places))


def mean_loss(losses: dict[str, list[float]]) -> float:
    """The mean over tasks, each with the same weight."""
    return statistics.fmean(statistics.fmean(rows) for rows in losses.values())
