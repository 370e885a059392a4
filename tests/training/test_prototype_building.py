"""How prototypes are built: exactly, lazily, once, in any thread and autograd mode, without random numbers."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model

import peft_arrow.tuner.prototypes as building
from peft_arrow import ArrowLoraConfig, ArrowLoraModel
from tests.pico import pico_adapter, pico_base
from tests.training.helpers import factors, logits, prototype_error, stored_prototypes, token_batch


@pytest.fixture
def built(monkeypatch) -> list[list[tuple[int, ...]]]:
    """The shapes of the A factors of each build, in order; the real function does the work."""
    shapes, real = [], building.top_right_singular_vectors

    def recording(lora_A, lora_B):
        shapes.append([tuple(factor.shape) for factor in lora_A])
        return real(lora_A, lora_B)

    monkeypatch.setattr(building, "top_right_singular_vectors", recording)
    return shapes


def inference_model(folders: dict[str, str], **options):
    return ArrowLoraModel.from_pretrained(pico_base(), folders, top_k=1, **options)


def is_unbuilt(model) -> bool:
    return all(torch.isnan(row).all() for row in stored_prototypes(model).values())


def test_nothing_is_built_before_the_first_use(adapter_folders, built):
    model = inference_model(adapter_folders)
    assert is_unbuilt(model) and built == []
    first = logits(model)
    layers = model.base_model.routed_layers().values()
    assert len(built) == len(layers)
    assert prototype_error(model) < 1e-6
    built.clear()
    assert torch.equal(logits(model), first) and built == []


def test_build_prototypes_builds_what_is_missing_and_refresh_everything(adapter_folders, built):
    model = inference_model(adapter_folders)
    layers = model.base_model.routed_layers().values()
    model.base_model.build_prototypes()
    assert len(built) == len(layers) and prototype_error(model) < 1e-6
    built.clear()
    model.base_model.build_prototypes()
    assert built == []
    model.base_model.refresh_prototypes()
    assert len(built) == len(layers)


def test_a_loaded_model_builds_nothing(adapter_folders, built, tmp_path):
    inference_model(adapter_folders).save_pretrained(tmp_path)
    built.clear()
    model = PeftModel.from_pretrained(pico_base(), tmp_path)
    logits(model)
    assert built == [] and prototype_error(model) < 1e-6


def test_the_first_use_in_inference_mode_then_training(adapter_folders):
    """Tensors made in inference mode cannot be saved for a backward; the prototypes must not be such."""
    routed = get_peft_model(pico_base(), ArrowLoraConfig(adapters=adapter_folders, top_k=3))
    with torch.inference_mode():
        routed(**token_batch())
    optimizer = torch.optim.AdamW([p for p in routed.parameters() if p.requires_grad], lr=0.1)
    before = factors(routed)
    for _ in range(2):
        routed(**token_batch()).loss.backward()
        optimizer.step()
    assert all(not torch.equal(x, y) for key in before for x, y in zip(before[key], factors(routed)[key]))
    with torch.inference_mode():
        routed(**token_batch())
    assert prototype_error(routed) < 1e-5
    routed(**token_batch()).loss.backward()


def test_a_model_made_in_inference_mode(adapter_folders):
    expected = logits(inference_model(adapter_folders))
    with torch.inference_mode():
        model = inference_model(adapter_folders)
        answer = model(input_ids=token_batch(2, 5)["input_ids"]).logits
    # tensors of inference mode do not tell when they change, so nothing is put together from them beforehand
    assert torch.allclose(answer.clone(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_eight_threads_make_the_first_request_together(adapter_folders, built):
    expected = logits(inference_model(adapter_folders))
    ids = token_batch(2, 5)["input_ids"]
    for _ in range(3):
        model = inference_model(adapter_folders)
        built.clear()
        barrier, answers, failures = threading.Barrier(8), {}, []

        def request(number, model=model, barrier=barrier, answers=answers, failures=failures):
            try:
                barrier.wait()
                with torch.no_grad():
                    answers[number] = model(input_ids=ids).logits
            except Exception as error:  # noqa: BLE001 (shown by the assertion below)
                failures.append(error)

        threads = [threading.Thread(target=request, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures and len(answers) == 8
        assert all(torch.equal(answer, expected) for answer in answers.values())
        assert len(built) == len(model.base_model.routed_layers()), "each layer was built once"


def random_states() -> list:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


def test_building_draws_no_random_number(adapter_folders):
    models = []
    for seed in (0, 1234):
        model = inference_model(adapter_folders)
        torch.manual_seed(seed)
        before = random_states()
        model.base_model.build_prototypes()
        model.base_model.refresh_prototypes()
        assert random_states() == before
        models.append(stored_prototypes(model))
    assert all(torch.equal(row, models[1][key]) for key, row in models[0].items())


def test_an_added_expert_costs_its_own_build_only(adapter_folders, built, tmp_path):
    model = inference_model(adapter_folders)
    logits(model)
    old = stored_prototypes(model)
    built.clear()
    adapter = pico_adapter(tmp_path / "more", seed=9, r=6, target_modules=["q_proj", "up_proj"])
    model.base_model.add_expert(adapter, name="more")
    logits(model)
    assert len(built) == 4 and all([rank for rank, _ in shapes] == [6] for shapes in built)
    new = stored_prototypes(model)
    assert all(torch.equal(row, new[key]) for key, row in old.items())
    assert prototype_error(model) < 1e-6
    built.clear()
    model.base_model.remove_expert("plurals")
    logits(model)
    assert built == [] and prototype_error(model) < 1e-6


def test_training_a_subset_costs_the_subset(adapter_folders, built):
    """The frozen experts' prototypes stay bit for bit."""
    config = ArrowLoraConfig(adapters=adapter_folders, top_k=1, trainable_experts=["dates"])
    model = get_peft_model(pico_base(), config)
    logits(model)
    old = stored_prototypes(model)
    built.clear()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**token_batch()).loss.backward()
    optimizer.step()
    logits(model)
    assert built and all([rank for rank, _ in shapes] == [8] for shapes in built)
    for key, row in stored_prototypes(model).items():
        assert torch.equal(row, old[key]) == (key[1] != "dates"), key


def test_a_fresh_expert_is_scored_by_its_A_until_B_moves():
    config = ArrowLoraConfig(num_experts=2, r=4, top_k=1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(pico_base(), config)
    logits(model)
    stored = stored_prototypes(model)
    for key, (lora_A, lora_B) in factors(model).items():
        assert lora_B.abs().max() == 0
        exact = torch.linalg.svd(lora_A.double(), full_matrices=False).Vh[0]
        assert (stored[key].double() @ exact).abs().item() == pytest.approx(1.0, abs=1e-6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**token_batch()).loss.backward()
    optimizer.step()
    logits(model)
    moved = [key for key, (_, lora_B) in factors(model).items() if lora_B.abs().max() > 0]
    assert moved
    after = stored_prototypes(model)
    for key in moved:
        lora_A, lora_B = factors(model)[key]
        exact = torch.linalg.svd(lora_B.double() @ lora_A.double(), full_matrices=False).Vh[0]
        assert (after[key].double() @ exact).abs().item() == pytest.approx(1.0, abs=1e-6)
        assert (after[key].double() @ stored[key].double()).abs().item() < 0.999


def test_no_prototype_has_a_gradient(adapter_folders):
    model = get_peft_model(pico_base(), ArrowLoraConfig(adapters=adapter_folders, top_k=2)).train()
    model(**token_batch()).loss.backward()
    routers = {n: p for n, p in model.named_parameters() if "arrow_lora_router" in n}
    assert routers and all(not p.requires_grad and p.grad is None for p in routers.values())
