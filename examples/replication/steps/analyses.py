"""What the numbers come from: who is alike, who helps whom, who is routed where."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
from peft import PeftModel

from peft_arrow import ArrowLoraModel, train_adapter
from peft_arrow.evaluation.batches import batches_by_length, padded
from peft_arrow.evaluation.rows import read_row
from peft_arrow.evaluation.scoring import score_options
from peft_arrow.library.delta import delta_products

from .data import plain
from .setting import Setting


def similarity(setting: Setting, library: str) -> None:
    """Cosines between a library's experts: of their updates, and of the numbers of A and B (the paper's)."""
    experts = list(setting.library(library).values())
    products = delta_products(experts)
    lengths = np.sqrt(np.diag(products))
    flat = np.stack(
        [
            np.concatenate([tensor.float().numpy().ravel() for _, tensor in sorted(one.tensors.items())])
            for one in experts
        ]
    )
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    found = {"names": [one.name for one in experts], "delta": (products / np.outer(lengths, lengths)).tolist()}
    setting.write(f"similarity/{library}.json", {**found, "factors": (flat @ flat.T).tolist()})


def routing(setting: Setting, library: str) -> None:
    """Where Arrow sends the upstream tasks' own tokens: agreement by layer, entropy, and who is taken for whom."""
    model, tokenizer = setting.base
    groups = setting.groups(library)
    own = {task: expert for expert, tasks in groups.items() for task in tasks}
    count, suites = setting.config["analyses"]["traced_rows"], setting.suites
    routed = ArrowLoraModel.from_pretrained(model, setting.library(library), top_k=setting.config["judging"]["top_k"])
    found: dict[str, Any] = {}
    try:
        for name, calibrated in (("arrow", False), ("arrow-calibrated", True)):
            routed.set_router("arrow", calibrated=False)
            if calibrated:
                routed.calibrate_router()
            with routed.trace_routing() as trace:
                for task in suites.upstream:
                    rows = [read_row(row, task) for row in suites.judged["upstream"][task][:count]]
                    ids = [tokenizer(row.prompt + row.completion)["input_ids"] for row in rows]
                    for batch in batches_by_length([len(row) for row in ids]):
                        tokens, mask = padded([ids[place] for place in batch], "right", 0, model.device)
                        trace.tasks = [task] * len(batch)
                        routed(input_ids=tokens, attention_mask=mask, use_cache=False)
            found[name] = _measured(trace, own)
    finally:
        routed.unload()
    setting.write(f"routing/{library}.json", {"experts": list(groups), "own": own, "routers": found})


def _measured(trace: Any, own: dict[str, str]) -> dict[str, Any]:
    agreement = {by: trace.agreement(own, by) for by in ("all", "layer", "kind")}
    return {
        "agreement": {by: {name: vars_of(one) for name, one in found.items()} for by, found in agreement.items()},
        "entropy": {name: vars_of(one) for name, one in trace.entropy("layer").items()},
        "shares": trace.shares("task"),
    }


def vars_of(one: Any) -> dict[str, Any]:
    """A frozen dataclass as JSON has it."""
    return {name: getattr(one, name) for name in one.__dataclass_fields__}


def list_pairs(setting: Setting) -> None:
    """Pairs of tasks at even distances of their private adapters' similarity, from the least to the most alike.

    As in the paper's Figure 2, which has one pair of each of 50 bins: most pairs are hardly alike, and drawn by chance
    they tell nothing about the others.
    """
    private = f"private-{setting.seed}"
    similarity(setting, private)
    found = json.loads((setting.root / f"similarity/{private}.json").read_text())
    pairs = [
        (found["delta"][one][other], found["factors"][one][other], found["names"][one], found["names"][other])
        for one, other in itertools.combinations(range(len(found["names"])), 2)
    ]
    chosen = []
    count = min(setting.config["analyses"]["pairs"], len(pairs))
    for wanted in np.linspace(min(pairs)[0], max(pairs)[0], count):
        chosen.append(min(pairs, key=lambda pair: abs(pair[0] - wanted)))
        pairs.remove(chosen[-1])
    setting.write(_list_of(setting), [dict(zip(("delta", "factors", "one", "other"), pair)) for pair in chosen])


def pair(setting: Setting, number: int) -> None:
    """Train one LoRA on both tasks of a pair, and compare it with their private ones on their eval rows."""
    model, tokenizer = setting.base
    told, seed = json.loads((setting.root / _list_of(setting)).read_text())[number], setting.seed
    tasks, training = (told["one"], told["other"]), setting.config["training"]
    rows = plain(row for task in tasks for row in setting.suites.train[task])
    folder = setting.root / "pairs" / f"{seed}-{number}-{'-'.join(tasks)}"
    train_adapter(
        model,
        rows,
        output_dir=folder,
        steps=2 * training["steps"],
        tokenizer=tokenizer,
        init_seed=seed,
        sft_config=setting.sft(seed),
        lora_config=setting.lora(),
        progress=False,
    )
    private = setting.library_folder(f"private-{seed}") / "experts"
    losses = {
        "joint": {task: _eval_losses(setting, folder, task) for task in tasks},
        "private": {task: _eval_losses(setting, private / task, task) for task in tasks},
    }
    setting.write(f"transfer/{number}-{seed}.json", {**told, "losses": losses})


def _list_of(setting: Setting) -> str:
    return f"pairs-{setting.seed}.json"


def _eval_losses(setting: Setting, folder: Any, task: str) -> list[float]:
    model, tokenizer = setting.base
    count = setting.config["adapting"]["eval_rows"]
    rows = [read_row(row, task) for row in setting.suites.judged["upstream"][task][:count]]
    adapted = PeftModel.from_pretrained(model, folder).eval()
    try:
        items = [{"prompt": row.prompt, "options": [row.completion]} for row in rows]
        return [round(options[0].mean_nll, 6) for options in score_options(adapted, tokenizer, items)]
    finally:
        adapted.unload()
