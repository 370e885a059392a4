"""Prototypes are those of the current weights: rebuilt once per optimizer step for what trains, and after a change."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

import peft_arrow.tuner.prototypes as building
from peft_arrow import ArrowLoraConfig
from tests.pico import pico_adapter, pico_base
from tests.training.helpers import logits, prototype_error, stored_prototypes, token_batch


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1.0, momentum=0.9),
    "adamw fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),  # the Trainer's default
    "adamw foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=True),
    "adamw loop": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=False),
}


@pytest.fixture
def routed(adapter_folders):
    """Make a trainable routed model with hard routing."""
    return lambda **options: get_peft_model(
        pico_base(), ArrowLoraConfig(adapters=adapter_folders, **{"top_k": 1, **options})
    )


@pytest.fixture
def built(monkeypatch) -> list[int]:
    """How many prototypes each build made, in order; the real function does the work."""
    counts, real = [], building.top_right_singular_vectors

    def counting(lora_A, lora_B):
        counts.append(len(lora_A))
        return real(lora_A, lora_B)

    monkeypatch.setattr(building, "top_right_singular_vectors", counting)
    return counts


def trained_parameters(model) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def step(model, optimizer) -> None:
    model(**token_batch()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def scramble(model) -> None:
    """New values in every factor, in place, as `copy_` and initialisers put them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "arrow_lora_" in name and "router" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("subset", [None, ["dates"]], ids=["all", "subset"])
def test_exact_after_every_step(make, subset, routed):
    model = routed(trainable_experts=subset).train()
    optimizer = make(trained_parameters(model))
    for _ in range(3):
        before = stored_prototypes(model)
        step(model, optimizer)
        assert prototype_error(model) > 1e-2, "the step changed the exact prototypes, and nothing was built yet"
        answer = logits(model)
        assert prototype_error(model) < 1e-5
        moved = {name for (_, name), row in stored_prototypes(model).items() if not torch.equal(row, before[_, name])}
        assert moved >= set(subset or ["plurals", "dates", "sql"])
        model.base_model.refresh_prototypes()
        assert torch.equal(logits(model), answer)


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}, {"use_reentrant": False}])
@pytest.mark.parametrize("subset", [None, ["dates"]], ids=["all", "subset"])
def test_built_once_per_step_and_never_in_the_recomputation(kwargs, subset, routed, built):
    model = routed(trainable_experts=subset).train()
    if kwargs is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        model.enable_input_require_grads()
    optimizer = OPTIMIZERS["adamw fused"](trained_parameters(model))
    layers = [layer.experts["default"] for layer in model.base_model.routed_layers().values()]
    everything = sorted(len(experts.positions) for experts in layers)
    trained = sorted(sum(experts.trainable) for experts in layers if any(experts.trainable))
    assert trained != everything if subset else trained == everything
    for number in range(3):
        for micro in range(3):  # gradient accumulation
            built.clear()
            loss = model(**token_batch(seed=micro)).loss
            expected = (trained if number else everything) if micro == 0 else []
            assert sorted(built) == expected, (number, micro)
            built.clear()
            loss.backward()
            assert built == [], "built in the backward"
        optimizer.step()
        optimizer.zero_grad()


def test_evaluation_and_other_models_build_nothing(routed, built):
    """Steps of an optimizer elsewhere in the process leave a model that does not train alone."""
    model, other = routed(), torch.nn.Linear(2, 2)
    frozen = routed(inference_mode=True).eval()
    logits(model), logits(frozen)
    built.clear()
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.1)
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    logits(frozen)
    assert built == []


def test_frozen_prototypes_stay(routed, built):
    model = routed(prototype_update="frozen").train()
    optimizer = OPTIMIZERS["adamw fused"](trained_parameters(model))
    logits(model)
    first = stored_prototypes(model)
    built.clear()
    for _ in range(2):
        step(model, optimizer)
    logits(model)
    assert built == [] and prototype_error(model) > 1e-2
    assert all(torch.equal(row, first[key]) for key, row in stored_prototypes(model).items())
    model.base_model.refresh_prototypes()
    assert prototype_error(model) < 1e-5


def test_frozen_prototypes_survive_saving(routed, tmp_path):
    model = routed(prototype_update="frozen").train()
    step(model, OPTIMIZERS["sgd"](trained_parameters(model)))
    expected = logits(model)
    assert prototype_error(model) > 1e-2
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(pico_base(), tmp_path)
    assert torch.equal(logits(again), expected)


def _load_state_dict(model, source, folder):
    model.load_state_dict(source.state_dict())


def _load_factors_only(model, source, folder):
    tensors = {key: value for key, value in source.state_dict().items() if "arrow_lora_router" not in key}
    model.load_state_dict(tensors, strict=False)


def _set_peft_state(model, source, folder):
    set_peft_model_state_dict(model, get_peft_model_state_dict(source))


def _load_adapter(model, source, folder):
    source.save_pretrained(folder)
    model.load_adapter(str(folder), "default", is_trainable=True)


def _add_and_remove(model, source, folder):
    adapter = pico_adapter(folder, seed=9, r=6, target_modules=["q_proj", "up_proj"])
    model.base_model.add_expert(adapter, name="more")
    assert "more" in model.base_model.expert_names
    logits(model)
    assert prototype_error(model) < 1e-5
    model.base_model.remove_expert("plurals")


def _to_dtype(model, source, folder):
    model.to(torch.bfloat16)


def _to_dtype_and_back(model, source, folder):
    model.to(torch.bfloat16).to(torch.float32)


def _to_device(model, source, folder):
    model.to("cpu")


CHANGES = {
    "load_state_dict": _load_state_dict,
    "load_state_dict without prototypes": _load_factors_only,
    "set_peft_model_state_dict": _set_peft_state,
    "load_adapter": _load_adapter,
    "add_expert and remove_expert": _add_and_remove,
    "copy_": lambda model, source, folder: scramble(model),
    "to(dtype)": _to_dtype,
    "to(dtype) and back": _to_dtype_and_back,
    "to(device)": _to_device,
}


@pytest.mark.parametrize("subset", [None, ["dates"]], ids=["all", "subset"])
@pytest.mark.parametrize("history", ["unused", "used", "stepped"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_exact_after_a_change(change, history, subset, routed, tmp_path):
    source = routed(trainable_experts=subset)
    scramble(source)
    logits(source)
    model = routed(trainable_experts=subset).train()
    if history != "unused":
        logits(model)
    if history == "stepped":
        step(model, OPTIMIZERS["adamw fused"](trained_parameters(model)))
    change(model, source, tmp_path / "change")
    answer = logits(model)
    assert prototype_error(model) < 1e-5
    assert stored_prototypes(model).popitem()[1].dtype == torch.float32
    model.base_model.refresh_prototypes()
    assert torch.equal(logits(model), answer)


def _pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _averaged(model):
    average = torch.optim.swa_utils.AveragedModel(model)
    scramble(model)
    average.update_parameters(model)
    logits(average.module)
    average.update_parameters(model)
    return average.module


COPIES = {"deepcopy": copy.deepcopy, "pickle": _pickled, "AveragedModel": _averaged}


@pytest.mark.parametrize("history", ["unused", "used", "stepped"])
@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_exact_in_a_copy(make, history, routed):
    model = routed().train()
    if history != "unused":
        logits(model)
    if history == "stepped":
        step(model, OPTIMIZERS["adamw foreach"](trained_parameters(model)))
    copied = make(model)
    answer = logits(copied)
    assert prototype_error(copied) < 1e-5
    if make is not _averaged:
        assert torch.equal(answer, logits(model))


def test_a_move_between_the_backward_and_the_step(routed):
    """Trainers that share memory between phases move models there and back at any time."""
    model = routed().train()
    optimizer = OPTIMIZERS["adamw foreach"](trained_parameters(model))
    model(**token_batch()).loss.backward()
    model.to("cpu")
    optimizer.step()
    logits(model)
    assert prototype_error(model) < 1e-5


def test_a_change_between_loading_and_the_first_use(routed, tmp_path):
    routed().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(pico_base(), tmp_path, is_trainable=True)
    scramble(model)
    logits(model)
    assert prototype_error(model) < 1e-5


def test_an_edit_through_data_needs_refresh_prototypes(routed):
    """The stated limit: such an edit cannot be seen."""
    model = routed()
    logits(model)
    for name, parameter in model.named_parameters():
        if "arrow_lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    logits(model)
    assert prototype_error(model) > 1e-2
    model.base_model.refresh_prototypes()
    assert prototype_error(model) < 1e-5
