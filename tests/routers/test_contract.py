"""What every row of `ROUTERS` must do: be saved and loaded, stay the same, take every option, refuse what is wrong."""

from __future__ import annotations

import contextlib
import copy
import io
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_arrow import ROUTERS, ArrowLoraConfig, ArrowLoraModel
from tests.pico import pico_base


OPTIONS = [
    {},
    {"granularity": "sequence"},
    {"tied": True},
    {"null_expert": 0.2},
    {"top_p": 0.6},
    {"masked_experts": ["dates"]},
    {"top_k": 1, "router_temperature": 0.3, "top_p": 0.9, "null_expert": -1.0, "masked_experts": ["sql", "euro"]},
]
RELOAD = """
import sys, torch, peft_arrow
from pathlib import Path
from peft import PeftModel
from transformers import LlamaForCausalLM
torch.manual_seed(12345)
root = Path(sys.argv[1])
ids = torch.load(root / "ids.pt")
for folder in sorted((root / "routed").iterdir()):
    base = LlamaForCausalLM.from_pretrained(root / "base")
    model = PeftModel.from_pretrained(base, folder, adapter_name="another")
    router = model.active_peft_config.router
    with torch.no_grad():
        if router in ("pinned", "oracle"):
            with model.pin_experts(["dates", None]):
                logits = model(ids).logits
        else:
            logits = model(ids).logits
    torch.save(logits, root / f"{folder.name}.pt")
"""


def prepared(model, name, rows, tokenizer):
    """The model with the router set, fitted where it needs data."""
    if ROUTERS[name].needs_data:
        options = {"steps": 3} if name == "phatgoose" else {}
        model.fit_router(name, rows, tokenizer=tokenizer, max_rows=3, **options)
    else:
        model.set_router(name)
    return model


def logits_of(model, ids):
    """Logits without gradients; pinned where the router wants it."""
    with torch.no_grad():
        if model.base_model.peft_config[model.active_adapter].router in ("pinned", "oracle"):
            with model.pin_experts(["dates", None]):
                return model(ids).logits
        return model(ids).logits


def test_round_trips_in_a_new_process(tmp_path, mixed, rows, ids, tokenizer):
    """Another process, adapter name and seed: the same logits bit for bit, with what was fitted."""
    pico_base().save_pretrained(tmp_path / "base")
    torch.save(ids, tmp_path / "ids.pt")
    expected = {}
    for name in ROUTERS:
        model = prepared(ArrowLoraModel.from_pretrained(pico_base(), mixed, top_k=2), name, rows, tokenizer)
        expected[name] = logits_of(model, ids)
        assert torch.equal(logits_of(model, ids), expected[name]), "two equal calls"
        model.save_pretrained(tmp_path / "routed" / name)
    done = subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ROUTERS:
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), expected[name]), name


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("options", OPTIONS[1:], ids=lambda o: "-".join(o))
def test_options_are_saved_too(tmp_path, model, name, options, rows, ids, tokenizer):
    """Every option on every router: finite logits, the same after loading, and nothing left when set back."""
    prepared(model, name, rows, tokenizer)
    before = logits_of(model, ids)
    defaults = {key: getattr(model.active_peft_config, key) for key in options}
    model.set_router(**options)
    expected = logits_of(model, ids)
    assert torch.isfinite(expected).all()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(pico_base(), tmp_path).eval()
    assert torch.equal(logits_of(loaded, ids), expected)
    for key, value in options.items():
        assert getattr(loaded.active_peft_config, key) == value
    model.set_router(**defaults)
    assert torch.equal(logits_of(model, ids), before)


@pytest.mark.parametrize("name", ROUTERS)
def test_copies_and_pickles(model, name, rows, ids, tokenizer):
    """copy.deepcopy, torch.save, and a second adapter beside the first."""
    prepared(model, name, rows, tokenizer)
    expected = logits_of(model, ids)
    assert torch.equal(logits_of(copy.deepcopy(model), ids), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits_of(torch.load(file, weights_only=False), ids), expected)
    model.add_adapter("second", ArrowLoraConfig(num_experts=2, target_modules=["q_proj"], init_weights=False))
    assert torch.equal(logits_of(model, ids), expected)
    model.set_adapter("second")
    model.set_router("spectr", granularity="sequence")
    assert torch.isfinite(logits_of(model, ids)).all()
    model.set_adapter("default")
    assert torch.equal(logits_of(model, ids), expected)
    model.delete_adapter("second")
    assert torch.equal(logits_of(model, ids), expected)


@pytest.mark.parametrize("name", [name for name in ROUTERS if name not in ("uniform", "pinned", "oracle")])
def test_routing_is_float32_in_bf16(mixed, name, rows, ids, tokenizer):
    """A bf16 base and autocast: scores stay float32 and the logits finite."""
    model = ArrowLoraModel.from_pretrained(pico_base().bfloat16(), mixed)
    prepared(model, name, rows, tokenizer)
    layer = model.base_model.routed_layers()["model.layers.0.self_attn.q_proj"]
    if not ROUTERS[name].is_prompt_level:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer.raw_logits("default", torch.randn(3, 32).bfloat16()).dtype == torch.float32
    assert torch.isfinite(logits_of(model, ids)).all()
    prepared(model.float(), name, rows, tokenizer)
    assert torch.isfinite(logits_of(model, ids)).all()


@pytest.mark.parametrize("name", ROUTERS)
def test_gradients_reach_inputs_and_experts(mixed, name, rows, ids, tokenizer):
    """A trainable model trains through every router."""
    model = ArrowLoraModel.from_pretrained(pico_base(), mixed, is_trainable=True).train()
    prepared(model, name, rows, tokenizer)
    context = model.pin_experts(["dates", "sql"]) if ROUTERS[name].is_pinned else model.routing_prompt(ids > 0)
    with context:
        model(ids, labels=ids).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert any(grad is not None and grad.abs().max() > 0 for grad in grads)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    assert not frozen


REFUSED = [
    ({"router": "nearest"}, "router='nearest' is unknown"),
    ({"top_p": 0.0}, "top_p=0.0"),
    ({"top_p": 1.5}, "top_p=1.5"),
    ({"top_p": "a"}, "top_p='a'"),
    ({"granularity": "word"}, "granularity='word'"),
    ({"tied": "yes"}, "tied='yes'"),
    ({"null_expert": float("nan")}, "null_expert=nan"),
    ({"null_expert": True}, "null_expert=True"),
    ({"masked_experts": ["nobody"]}, "masked_experts holds 'nobody'"),
    ({"masked_experts": "dates"}, "masked_experts='dates'"),
    ({"masked_experts": ["plurals", "dates", "sql", "roman", "euro"]}, "leaves no expert"),
    ({"calibrated": True}, "calibrate_router"),
    ({"router": "centroid"}, "fit_router"),
    ({"router": "task_predictor"}, "fit_router"),
    ({"router": "spectr", "weights": "half"}, "weights='half'"),
    ({"router": "lag", "filter_k": 0}, "filter_k=0 is not allowed; it is a whole number of at least 1"),
    ({"router": "random", "seed": 0.5}, "seed=0.5"),
    ({"top_k": 0}, "top_k=0"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda v: str(v)[:40])
def test_refusals_change_nothing(model, ids, options, message):
    """Each names the argument and what is allowed, and leaves the model as it was."""
    before, settings = logits_of(model, ids), model.active_peft_config.to_dict()
    with pytest.raises(ValueError, match=message):
        model.set_router(**options)
    assert torch.equal(logits_of(model, ids), before)
    assert model.active_peft_config.to_dict() == settings


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda v: str(v)[:40])
def test_refusals_at_creation_leave_the_base(mixed, ids, options, message):
    """The same when a model is made: an error, and a base without a routed layer."""
    base = pico_base()
    own = {key: value for key, value in options.items() if key in ("weights", "filter_k", "seed")}
    options = {key: value for key, value in options.items() if key not in own}
    with pytest.raises(ValueError, match=message):
        ArrowLoraModel.from_pretrained(base, mixed, **options, **({"router_options": own} if own else {}))
    assert not any("arrow" in name for name, _ in base.named_parameters())


def test_unknown_options_are_refused(model):
    """An option of another router is named with those that are allowed."""
    with pytest.raises(TypeError, match="unknown argument 'filter_k'; allowed are router, top_k"):
        model.set_router("arrow", filter_k=3)
    with pytest.raises(ValueError, match="no option 'filter_k'"):
        ArrowLoraConfig(num_experts=2, router="arrow", router_options={"filter_k": 3})


def test_options_of_a_router_end_with_it(model):
    """Common options keep their value, a router's own start anew with it."""
    model.set_router("lag", filter_k=3, top_k=1)
    model.set_router("spectr", weights="equal")
    assert model.active_peft_config.router_options == {"weights": "equal"} and model.active_peft_config.top_k == 1
    model.set_router(top_k=2)
    assert model.active_peft_config.router_options == {"weights": "equal"}
    model.set_router("lag")
    assert model.active_peft_config.make_router().chosen["filter_k"] == 20


def test_a_router_fitted_for_other_experts(tmp_path, model, mixed, rows, tokenizer, ids):
    """What was stored ends with a change of the experts; while it is in use the change is refused and nothing lost."""
    model.fit_router("centroid", rows, tokenizer=tokenizer)
    before = logits_of(model, ids)
    with pytest.raises(ValueError, match="fit_router"):
        model.remove_expert("sql")
    with pytest.raises(ValueError, match="fit_router"):
        model.add_expert(mixed["sql"], "sql-2")
    assert model.expert_names == list(mixed) and torch.equal(logits_of(model, ids), before)
    model.set_router("arrow")
    model.remove_expert("sql")
    with pytest.raises(ValueError, match="fit_router"):
        model.set_router("centroid")
    model.fit_router("centroid", {name: some for name, some in rows.items() if name != "sql"}, tokenizer=tokenizer)
    model.save_pretrained(tmp_path)
    config = ArrowLoraConfig.from_pretrained(str(tmp_path))
    config.fitted["centroid"]["experts"] = ["others"]
    with pytest.raises(ValueError, match="was called for the experts"):
        get_peft_model(pico_base(), config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: {**rows, "nobody": rows["sql"]}, "'nobody', which is not an expert"),
        (lambda rows: {k: v for k, v in rows.items() if k != "sql"}, "no rows for expert 'sql'"),
        (lambda rows: {**rows, "sql": []}, "no rows for expert 'sql'"),
        (lambda rows: {**rows, "sql": "file.jsonl"}, "is a str"),
        (lambda rows: {**rows, "sql": ["text"]}, "row 0 of 'sql' is a str"),
        (lambda rows: {**rows, "sql": [{"question": "a"}]}, r"columns \['question'\]"),
        (lambda rows: list(rows), "datasets is a list"),
    ],
)
def test_bad_data_for_a_router(model, rows, tokenizer, ids, change, message):
    """An error that names the expert and the row; the model routes as before."""
    before = logits_of(model, ids)
    with pytest.raises(ValueError, match=message):
        model.fit_router("centroid", change(rows), tokenizer=tokenizer)
    assert torch.equal(logits_of(model, ids), before) and not model.active_peft_config.fitted


def test_other_bad_calls(model, rows, tokenizer, ids):
    """fit_router of what needs no data, unknown options, no tokenizer, pins that do not fit."""
    with pytest.raises(ValueError, match="needs no data"):
        model.fit_router("arrow", rows, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="unknown option 'steps'"):
        model.fit_router("centroid", rows, tokenizer=tokenizer, steps=3)
    with pytest.raises(ValueError, match="pool='max'"):
        model.fit_router("centroid", rows, tokenizer=tokenizer, pool="max")
    with pytest.raises(ValueError, match="tokenizer=None"):
        model.fit_router("centroid", rows)
    with pytest.raises(ValueError, match="sequences=0"):
        model.calibrate_router(sequences=0)
    with pytest.raises(ValueError, match="'nobody'; allowed are None and"), model.pin_experts(["nobody", None]):
        pass
    with pytest.raises(ValueError, match="rows of pinned experts"), model.pin_experts(["sql"] * 7):
        model(ids)
    model.set_router("pinned")
    with pytest.raises(RuntimeError, match="pin_experts"):
        model(ids)
    with pytest.raises(ValueError, match="nothing to calibrate"):
        model.calibrate_router()


@pytest.mark.parametrize("name", ["arrow", "centroid", "task_predictor"])
def test_native_loading_of_transformers(tmp_path, model, name, rows, ids, tokenizer):
    """`load_adapter` of transformers: one choice a request works; a prompt-level router says what it lacks."""
    prepared(model, name, rows, tokenizer)
    if name == "arrow":
        model.set_router(granularity="sequence")
    model.save_pretrained(tmp_path)
    native = pico_base()
    native.load_adapter(str(tmp_path))
    with torch.no_grad():
        if name == "task_predictor":
            with pytest.raises(RuntimeError, match="was not loaded"):
                native(ids)
            return
        assert torch.equal(native(ids).logits, logits_of(model, ids))
        steps = [m.generate(ids, max_new_tokens=4, do_sample=False) for m in (native, model)]
    assert torch.equal(*steps)


@pytest.mark.parametrize("name", ROUTERS)
def test_one_expert_alone(mixed, name, rows, ids, tokenizer):
    """A library of one: routed is the plain adapter, whatever the router says."""
    model = ArrowLoraModel.from_pretrained(pico_base(), {"dates": mixed["dates"]})
    prepared(model, name, {"dates": rows["dates"]}, tokenizer)
    with torch.no_grad():
        plain = PeftModel.from_pretrained(pico_base(), mixed["dates"])(ids).logits
        with model.pin_experts(["dates", "dates"]) if ROUTERS[name].is_pinned else contextlib.nullcontext():
            routed = model(ids).logits
    assert float((routed - plain).abs().max()) < 1e-5


def test_an_interrupted_fit_loses_nothing(model, rows, tokenizer, ids, monkeypatch):
    """Ctrl-C in the middle of the gates: weights, hooks and router are as before."""
    before = logits_of(model, ids)
    steps = []

    def interrupt(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    real = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.fit_router("phatgoose", rows, tokenizer=tokenizer, steps=4)
    assert torch.equal(logits_of(model, ids), before)
    assert all(layer.gating is None for layer in model.base_model.routed_layers().values())


def test_pinned_rows_equal_plain_adapters(model, mixed, ids):
    """Oracle routing: each row is what the plain adapter alone gives; several at once are their weighted sum."""
    with torch.no_grad():
        with model.pin_experts(["dates", None]):
            rows = model(ids).logits
        plain = PeftModel.from_pretrained(pico_base(), mixed["dates"])(ids[:1]).logits
        assert float((rows[:1] - plain).abs().max()) < 1e-5
        assert float((rows[1:] - pico_base()(ids[1:]).logits).abs().max()) < 1e-6
        with model.pin_experts([["dates", "sql"], {"dates": 0.5, "sql": 0.5}]):
            both = model(ids[:1].repeat(2, 1)).logits
        assert torch.equal(both[0], both[1])
        model.export_lora(folder := str(mixed["dates"]) + "-mean", weights={"dates": 0.5, "sql": 0.5}, method="cat")
        merged = PeftModel.from_pretrained(pico_base(), folder)(ids[:1]).logits
        assert float((both[:1] - merged).abs().max()) < 1e-5
        with model.pin_experts(["sql", "dates"]):
            beams = model.generate(input_ids=ids, num_beams=2, max_new_tokens=3, do_sample=False)
        with model.pin_experts(["sql"]):
            alone = model.generate(input_ids=ids[:1], num_beams=2, max_new_tokens=3, do_sample=False)
    assert torch.equal(beams[:1, : alone.shape[1]], alone)
