"""Scores against the definitions, and results that are kept per method."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from peft_arrow import AdapterLibrary, ArrowLoraModel
from peft_arrow.quickstart.judge import PlainJudge, encode, files_fingerprint, judge_rows
from peft_arrow.quickstart.methods import JudgeSettings, Results, judge_methods
from peft_arrow.quickstart.settings import Trained
from peft_arrow.quickstart.task_list import load_tasks
from peft_arrow.quickstart.tasks import Row


ROWS = [Row("one\n", "uno", (), ""), Row("twenty-two\n", "veintidos", (), ""), Row("3\n", "t", (), "")]


def greedy(base, tokenizer, prompt, length):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    for _ in range(length):
        ids = torch.cat([ids, base(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, -length:].tolist()


def test_loss_is_that_of_each_row_alone(base, tokenizer):
    score = judge_rows(base, tokenizer, ROWS)
    total, count = 0.0, 0
    for row, row_loss in zip(ROWS, score.row_losses, strict=True):
        prompt = tokenizer(row.prompt).input_ids
        completion = [*tokenizer(row.completion).input_ids, tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + completion])
        with torch.no_grad():
            loss = base(torch.tensor([prompt + completion]), labels=labels).loss.item()
        assert row_loss == pytest.approx(loss, abs=1e-4)
        total, count = total + loss * len(completion), count + len(completion)
    assert score.loss == pytest.approx(total / count, abs=1e-4)


def test_exact_match_is_what_greedy_decoding_writes(base, tokenizer):
    prompt = "abc\n"
    written = greedy(base, tokenizer, prompt, 3)
    tokenizer_eos = tokenizer.eos_token_id
    right = Row(prompt, tokenizer.decode(written[:2]), (), "")
    try:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(written[2])
        assert judge_rows(base, tokenizer, [right]).exact == 1.0
        assert judge_rows(base, tokenizer, [right, ROWS[0]]).exact == 0.5
    finally:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokenizer_eos)


def test_encode_pads_on_the_left(tokenizer):
    batch, labels = encode(tokenizer, ROWS)
    assert batch["attention_mask"].sum(1).tolist() == [4 + 4, 11 + 10, 2 + 2]
    assert batch["input_ids"][:, -1].tolist() == [tokenizer.eos_token_id] * 3
    assert (labels != -100).sum(1).tolist() == [4, 10, 2]


def test_random_routing_depends_on_the_seed_only(base, tokenizer, adapter_folders):
    model = ArrowLoraModel.from_pretrained(base, adapters=adapter_folders, top_k=1)

    def run(seed):
        model.set_router("random", top_k=1, seed=seed)
        return judge_rows(model, tokenizer, ROWS).loss

    arrow = judge_rows(model, tokenizer, ROWS).loss
    assert run(0) == run(0) != run(1)
    model.set_router("arrow")
    assert judge_rows(model, tokenizer, ROWS).loss == arrow


def test_plain_judge_switches_between_base_and_adapters(base, tokenizer, adapter_folders):
    alone = judge_rows(base, tokenizer, ROWS)
    judge = PlainJudge(base, tokenizer, adapter_folders)
    assert judge.base(ROWS) == alone
    losses = {name: judge.single(name, ROWS).loss for name in adapter_folders}
    assert len({alone.loss, *losses.values()}) == 4


def test_results_are_kept_under_a_fingerprint(tmp_path):
    bar = tqdm(total=2, file=io.StringIO())
    results = Results(tmp_path, "one", bar)
    results.fill("base", lambda: {"roman": 1})
    assert bar.n == 1
    same, other = Results(tmp_path, "one", bar), Results(tmp_path, "two", bar)
    assert same.has("base") and same.values == {"base": {"roman": 1}} and not same.has("base", "own")
    assert not other.has("base")
    bar.close()


def test_judge_methods_is_not_repeated(tmp_path, base, tokenizer, adapter_folders):
    """Three private adapters, two clusters; each column against the model it stands for, loaded by itself."""
    tasks = load_tasks(["roman", "clock", "spell"])
    first, second, third = map(Path, adapter_folders.values())
    library = AdapterLibrary.from_pretrained({"cluster_0": third, "cluster_1": first}, "my-base")
    library.save_pretrained(tmp_path / "library")
    experts = {name: tmp_path / "library/experts" / name for name in ("cluster_0", "cluster_1")}
    groups = {"cluster_0": ["clock", "spell"], "cluster_1": ["roman"]}
    private = {"clock": second, "spell": third, "roman": first}
    trained = Trained(tmp_path / "library", experts, private, groups)
    settings = JudgeSettings(heldout=2, top_k=2, seeds=2)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    scores, best = judge_methods(tasks, trained, tmp_path, lambda: (base, tokenizer), settings, None)
    names = ["base", "uniform", "random-0", "random-1", "single", "arrow", "arrow_calibrated", "arrow_private"]
    assert list(scores) == [*names, "private_calibrated", "own_cluster", "own_private"] and best in experts
    assert scores["own_private"]["spell"] == scores["own_cluster"]["spell"] != scores["own_cluster"]["clock"]
    assert scores["own_private"]["roman"] == scores["own_cluster"]["roman"]
    assert all(scores["single"][task] == scores["own_cluster"][task] for task in groups[best])
    assert scores["arrow"] != scores["arrow_private"] != scores["uniform"]
    for method, adapters in (("arrow", tmp_path / "library"), ("arrow_private", private)):
        model = ArrowLoraModel.from_pretrained(base, adapters, top_k=2)
        expected = judge_rows(model, tokenizer, tasks[0].heldout_rows(2)).row_losses
        assert scores[method]["roman"]["row_losses"] == pytest.approx(expected, abs=1e-5)
        model.calibrate_router()
        expected = judge_rows(model, tokenizer, tasks[0].heldout_rows(2)).row_losses
        calibrated = "arrow_calibrated" if method == "arrow" else "private_calibrated"
        assert scores[calibrated]["roman"]["row_losses"] == pytest.approx(expected, abs=1e-5)
        model.unload()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert judge_methods(tasks, trained, tmp_path, None, settings, None) == (scores, best)


def test_fingerprint_follows_the_weights(tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("x")
    before = files_fingerprint([tmp_path], {"top_k": 4})
    assert files_fingerprint([tmp_path], {"top_k": 4}) == before != files_fingerprint([tmp_path], {"top_k": 3})
    (tmp_path / "adapter_model.safetensors").write_text("y")
    assert files_fingerprint([tmp_path], {"top_k": 4}) != before
