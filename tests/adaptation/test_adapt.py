"""`adapt` against formulas that are written here apart: what each method starts from, trains and saves."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from peft_arrow import AdapterLibrary, adapt
from tests.adaptation.data import ROWS, SFT, base_in, config_of, library_in, pico_named, tensors_of
from tests.pico import pico_adapter, pico_tokenizer


LIBRARY_METHODS = ("shared", "mean", "arrow", "poly", "polyz", "lorahub")


def run(folder, method, library, name="adapted", **options):
    options = {"rows": 4, "evaluations": 5, **options} if method == "lorahub" else options
    steps = {} if method == "lorahub" else {"steps": options.pop("steps", 3)}
    return adapt(
        str(base_in(folder)),
        library,
        options.pop("dataset", ROWS),
        method=method,
        output_dir=folder / name,
        sft_config={**SFT, **options.pop("sft", {})},
        progress=False,
        **steps,
        **options,
    )


def one_of(library):
    return library.select(list(library)[:1])


def still(folder, method, library, **options):
    """The adapter that a method begins with: trained with a rate that moves nothing."""
    ref = run(folder, method, library, steps=1, sft={"learning_rate": 0.0}, **options)
    return tensors_of(ref.source)


@pytest.mark.parametrize("method", ["scratch", *LIBRARY_METHODS])
def test_result_is_a_plain_lora_that_peft_loads(tmp_path, method):
    library = library_in(tmp_path)
    ref = run(tmp_path, method, one_of(library) if method == "shared" else library)
    model = PeftModel.from_pretrained(pico_named(tmp_path), ref.source)
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        adapted = model(ids).logits
        with model.disable_adapter():
            assert not torch.equal(adapted, model(ids).logits)
    assert config_of(ref.source)["peft_type"] == "LORA"
    assert all(".lora_A.weight" in key or ".lora_B.weight" in key for key in tensors_of(ref.source))


def test_shared_begins_with_the_expert_itself(tmp_path):
    library = library_in(tmp_path)
    found = still(tmp_path, "shared", one_of(library))
    source = tensors_of(tmp_path / "e0")
    assert found.keys() == source.keys() and all(torch.equal(found[key], source[key]) for key in source)


def test_shared_goes_on_from_an_expert_of_several_ranks(tmp_path):
    folder = pico_adapter(
        tmp_path / "uneven",
        seed=5,
        base=pico_named(tmp_path),
        r=4,
        rank_pattern={"v_proj": 1},
        target_modules=["q_proj", "v_proj"],
    )
    found = dense(still(tmp_path, "shared", [folder]), 2)
    tensors = tensors_of(folder)
    for module, update in found.items():
        scaling = 8 / 4 if "q_proj" in module else 8 / 1
        source = {key: value for key, value in tensors.items() if module in key}
        np.testing.assert_allclose(update, dense(source, scaling)[module], atol=1e-5)


def test_mean_is_the_mean_of_A_and_of_B_apart(tmp_path):
    found = still(tmp_path, "mean", library_in(tmp_path))
    sources = [tensors_of(tmp_path / f"e{number}") for number in range(3)]
    for key, tensor in found.items():
        expected = np.mean([source[key].numpy() for source in sources], axis=0)
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-5, atol=1e-7)
    assert config_of(tmp_path / "adapted")["lora_alpha"] / config_of(tmp_path / "adapted")["r"] == 4


def dense(tensors, scaling):
    """Module -> its update as a dense matrix, float64."""
    modules = {key.partition(".lora_")[0] for key in tensors}
    return {
        module: scaling
        * tensors[f"{module}.lora_B.weight"].double().numpy()
        @ tensors[f"{module}.lora_A.weight"].double().numpy()
        for module in modules
    }


def test_mean_of_updates_is_cut_to_the_rank_by_a_dense_svd(tmp_path):
    found = dense(still(tmp_path, "mean", library_in(tmp_path), aggregation="output"), 4)
    every = [dense(tensors_of(tmp_path / f"e{number}"), 4) for number in range(3)]
    for module, update in found.items():
        U, S, Vh = np.linalg.svd(np.mean([one[module] for one in every], axis=0))
        np.testing.assert_allclose(update, (U[:, :2] * S[:2]) @ Vh[:2], atol=1e-5 * S[0])


def test_experts_of_other_ranks_scalings_and_modules_keep_their_updates(tmp_path):
    """With one expert the mean is that expert, whatever the other's form is: filled with zeros, or rescaled."""
    library_in(tmp_path, 1)
    other = pico_adapter(
        tmp_path / "other", seed=7, base=pico_named(tmp_path), r=1, lora_alpha=3, target_modules=["q_proj", "o_proj"]
    )
    library = AdapterLibrary.from_pretrained({"e0": tmp_path / "e0", "other": other})
    found = still(tmp_path, "mean", library, aggregation="output")
    config = config_of(tmp_path / "adapted")
    updates = dense(found, config["lora_alpha"] / config["r"])
    first, second = dense(tensors_of(tmp_path / "e0"), 4), dense(tensors_of(other), 3)
    assert updates.keys() == first.keys() | second.keys()
    for module, update in updates.items():
        wanted = (first.get(module, 0) + second.get(module, 0)) / 2
        U, S, Vh = np.linalg.svd(wanted)
        np.testing.assert_allclose(update, (U[:, :2] * S[:2]) @ Vh[:2], atol=1e-5 * S[0])


def test_arrow_begins_with_the_weights_of_its_routing(tmp_path):
    """One module deep: the first layer's input is that of the base, so its routing can be recomputed from scratch."""
    library, base = library_in(tmp_path), pico_named(tmp_path)
    found = still(tmp_path, "arrow", library, top_k=2, rows=8)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    sources = [tensors_of(tmp_path / f"e{number}") for number in range(3)]
    prototypes = [
        np.linalg.svd((one[key.format("B")] @ one[key.format("A")]).double().numpy())[2][0] for one in sources
    ]
    sums, seen, tokenizer = np.zeros(3), [], pico_tokenizer()
    base.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    for row in ROWS:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            base(torch.tensor([ids]))
    states = np.concatenate([x[0].double().numpy() for x in seen])
    for state in states:
        logits = np.abs(np.array([prototype @ state for prototype in prototypes]))
        chosen = np.argsort(-logits)[:2]
        weights = np.exp(logits[chosen] - logits[chosen].max())
        sums[chosen] += weights / weights.sum()
    shares = sums / sums.sum()
    for half in "AB":
        expected = sum(share * one[key.format(half)].double().numpy() for share, one in zip(shares, sources))
        np.testing.assert_allclose(found[key.format(half)].numpy(), expected, rtol=1e-3, atol=1e-5)


def test_polyz_keeps_the_experts_and_poly_moves_them(tmp_path):
    """Of polyz each module is sum w_i A_i and sum w_i B_i with the same w, that sum to 1; poly is no such sum."""
    library = library_in(tmp_path)
    sources = [tensors_of(tmp_path / f"e{number}") for number in range(3)]
    errors = {}
    for method in ("polyz", "poly"):
        found = tensors_of(run(tmp_path, method, library, method, sft={"learning_rate": 0.05}).source)
        worst, sums, moved = 0.0, [], 0.0
        for key in (key for key in found if ".lora_A" in key):
            names = (key, key.replace("lora_A", "lora_B"))
            stacked = np.stack([np.concatenate([one[name].numpy().ravel() for name in names]) for one in sources], 1)
            target = np.concatenate([found[name].numpy().ravel() for name in names])
            w, *_ = np.linalg.lstsq(stacked, target, rcond=None)
            worst = max(worst, float(np.abs(stacked @ w - target).max()))
            sums.append(w.sum())
            moved = max(moved, float(np.abs(w - 1 / 3).max()))
        errors[method] = worst
        assert moved > 0.01, "the weights learn"
        if method == "polyz":
            np.testing.assert_allclose(sums, 1, atol=1e-4)
    assert errors["polyz"] < 1e-5 < 1e-3 < errors["poly"]


def test_lorahub_is_one_weight_an_expert_and_keeps_the_best_kind_of_try(tmp_path):
    library = library_in(tmp_path)
    found = tensors_of(run(tmp_path, "lorahub", library, evaluations=8).source)
    sources = [tensors_of(tmp_path / f"e{number}") for number in range(3)]
    stacked = np.stack([np.concatenate([one[key].numpy().ravel() for key in found]) for one in sources], 1)
    target = np.concatenate([tensor.numpy().ravel() for tensor in found.values()])
    w, *_ = np.linalg.lstsq(stacked, target, rcond=None)
    np.testing.assert_allclose(stacked @ w, target, atol=1e-6)
    assert np.abs(w).max() <= 1.5 + 1e-6
    record = json.loads((tmp_path / "adapted" / "training.json").read_text())
    assert len(record["losses"]) == 8 and record["steps"] == 0


def test_the_base_is_given_back_as_it_was(tmp_path):
    base, library = pico_named(tmp_path), library_in(tmp_path)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    for method in ("mean", "arrow", "poly", "lorahub"):
        options = {"rows": 4, "evaluations": 2} if method == "lorahub" else {"steps": 1}
        quiet = {"sft_config": SFT, "progress": False, "tokenizer": pico_tokenizer()}
        adapt(base, library, ROWS, method=method, output_dir=tmp_path / method, **quiet, **options)
    after = base.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_done_is_not_done_again_and_a_change_is_an_error(tmp_path):
    library = library_in(tmp_path)
    ref = run(tmp_path, "mean", library)
    stamp = (tmp_path / "adapted" / "training.json").stat().st_mtime_ns
    run(tmp_path, "mean", library)
    assert (tmp_path / "adapted" / "training.json").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="adapt.method was 'mean' and is now 'poly'"):
        run(tmp_path, "poly", library)
    with pytest.raises(ValueError, match="adapt.library"):
        run(tmp_path, "mean", library.select(["e0", "e1"]))
    assert ref.source == tmp_path / "adapted"


class Killed(BaseException):
    """What stands for a kill: nothing catches it."""


@pytest.mark.parametrize("method", ["mean", "poly", "polyz", "lorahub"])
def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path, monkeypatch, method):
    library = library_in(tmp_path)
    whole = tensors_of(run(tmp_path, method, library, "whole", steps=5).source)

    def dies(bar):
        def on_step(step, steps):
            if step == 3:
                raise Killed

        return on_step

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["peft_arrow.adaptation.adapt"], "moved", dies)
        with pytest.raises(Killed):
            run(tmp_path, method, library, "killed", steps=5)
    assert not (tmp_path / "killed").exists() and (tmp_path / ".killed.checkpoints").exists()
    found = tensors_of(run(tmp_path, method, library, "killed", steps=5).source)
    assert found.keys() == whole.keys() and all(torch.equal(found[key], whole[key]) for key in whole)
    assert not (tmp_path / ".killed.checkpoints").exists()


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("best", {}, "method='best' is unknown; allowed are 'scratch', 'shared'"),
        ("poly", {"aggregation": "output"}, "aggregation='output' is not for method='poly'"),
        ("mean", {"aggregation": "both"}, "aggregation='both' is unknown"),
        ("arrow", {"top_k": 0}, "top_k=0 is not allowed"),
        ("lorahub", {"evaluations": 1.5}, "evaluations=1.5 is not allowed"),
        ("mean", {"lora_config": {"r": 8}}, "rank, alpha and modules are those of the library"),
        ("shared", {}, "method='shared' goes on with one expert, and the library has 3"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path, method, options, message):
    library = library_in(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, method, library, **options)
    assert not list(tmp_path.glob("*adapted*"))


def test_no_library_another_base_and_nan_are_errors(tmp_path):
    library = library_in(tmp_path)
    with pytest.raises(ValueError, match="library is None; method='mean' starts from a library"):
        run(tmp_path, "mean", None)
    with pytest.raises(ValueError, match="is for the base model"):
        adapt("some/other-base", library, ROWS, method="mean", output_dir=tmp_path / "adapted", progress=False)
    broken = library["e0"].tensors
    tensors = {key: tensor.clone() for key, tensor in broken.items()}
    next(iter(tensors.values()))[0, 0] = float("nan")
    with pytest.raises(ValueError, match="holds NaN"):
        run(tmp_path, "mean", AdapterLibrary({"e0": replace(library["e0"], tensors=tensors)}, str(base_in(tmp_path))))
    assert not list(tmp_path.glob("*adapted*"))


@pytest.mark.parametrize("method", ["arrow", "lorahub"])
def test_texts_have_no_answers_to_read(tmp_path, method):
    library = library_in(tmp_path)
    with pytest.raises(ValueError, match="reads prompts and completions, and dataset 'texts' is of texts"):
        run(tmp_path, method, library, name="texts", dataset=[{"text": "abc"}] * 4)
    assert not (tmp_path / "texts").exists()


def test_a_library_of_another_size_names_the_module(tmp_path):
    wide = pico_named(tmp_path)
    config = wide.config.__class__(**{**wide.config.to_dict(), "hidden_size": 64})
    config._name_or_path = str(base_in(tmp_path))
    with torch.random.fork_rng(devices=[]):
        other = LlamaForCausalLM(config)
    folder = pico_adapter(tmp_path / "wide", seed=0, base=other, r=2, target_modules=["q_proj"])
    for method in ("mean", "poly"):
        with pytest.raises(ValueError, match="the library is of another base model"):
            run(tmp_path, method, [folder])
    assert not (tmp_path / "adapted").exists()
