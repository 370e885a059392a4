"""Experts that were trained on tasks that need them: which routers find a task's own expert."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_arrow import ROUTERS, ArrowLoraModel
from tests.pico import pico_base


ALPHABETS = {"lower": "abcdefgh", "upper": "QRSTUVWX", "digits": "0123456789", "signs": "+-*/=<>!"}
STEPS = 60


def rows_of(task: str, count: int, seed: int) -> list[dict[str, str]]:
    """Reverse a word of the task's own letters."""
    generator = torch.Generator().manual_seed(seed)
    letters, rows = ALPHABETS[task], []
    for _ in range(count):
        picks = torch.randint(len(letters), (5,), generator=generator).tolist()
        word = "".join(letters[pick] for pick in picks)
        rows.append({"prompt": f"{word} ", "completion": word[::-1]})
    return rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer):
    """Four rank-4 adapters of the pico base, each trained on its task."""
    root, folders = tmp_path_factory.mktemp("own"), {}
    for place, task in enumerate(ALPHABETS):
        torch.manual_seed(place)
        config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules="all-linear")
        model = get_peft_model(pico_base(), config).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(STEPS):
            rows = rows_of(task, 8, 1000 * place + step)
            ids = torch.tensor([tokenizer(r["prompt"] + r["completion"])["input_ids"] for r in rows])
            labels = ids.clone()
            labels[:, :6] = -100
            model(ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(root / task)
        folders[task] = str(root / task)
    return folders


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """task -> ids of prompts that no adapter saw."""
    return {
        task: torch.tensor([tokenizer(row["prompt"])["input_ids"] for row in rows_of(task, 20, 99_000)])
        for task in ALPHABETS
    }


@pytest.mark.parametrize(
    ("router", "options", "least"),
    [
        ("arrow", {}, 0.30),
        ("arrow", {"calibrated": True}, 0.35),
        ("arrow", {"tied": True}, 0.30),
        ("spectr", {}, 0.30),
        ("spectr", {"calibrated": True}, 0.35),
        ("lag", {"filter_k": 2, "top_k": 1}, 0.30),
        ("centroid", {}, 0.50),
        ("task_predictor", {"top_k": 1}, 0.95),
        ("retrieval", {"top_k": 1}, 0.80),
    ],
    ids=lambda value: str(value),
)
def test_the_own_expert_is_found_more_often_than_by_chance(trained, prompts, tokenizer, router, options, least):
    """Share of tokens and modules whose largest weight is on their task's expert; chance is 1/4."""
    model = ArrowLoraModel.from_pretrained(pico_base(), trained, top_k=2)
    options = dict(options)
    if ROUTERS[router].needs_data:
        data = {task: rows_of(task, 16, 7) for task in ALPHABETS}
        model.fit_router(router, data, tokenizer=tokenizer)
    is_calibrated = options.pop("calibrated", False)
    model.set_router(router, **options)
    if is_calibrated:
        model.calibrate_router()
    with model.trace_routing() as trace, torch.no_grad():
        for task, ids in prompts.items():
            trace.tasks = [task] * len(ids)
            model(ids)
    found = trace.agreement()["all"]
    assert found.chance == pytest.approx(0.25)
    assert found.top > least
    with model.trace_routing() as trace, torch.no_grad():
        model.set_router("random", calibrated=False, **({"top_k": 2}))
        for task, ids in prompts.items():
            trace.tasks = [task] * len(ids)
            model(ids)
    assert abs(trace.agreement()["all"].top - 0.25) < 0.05


def test_oracle_equals_the_plain_adapter(trained, prompts):
    """Each row with its own expert: plain PEFT's logits."""
    model = ArrowLoraModel.from_pretrained(pico_base(), trained)
    for task, ids in prompts.items():
        with torch.no_grad():
            with model.pin_experts([task] * len(ids)):
                routed = model(ids).logits
            plain = PeftModel.from_pretrained(pico_base(), trained[task])(ids).logits
        assert float((routed - plain).abs().max()) < 1e-4
