"""Products of updates against dense delta-W in numpy; what counts as a near-duplicate and what does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_arrow import Adapter
from peft_arrow.library import delta
from peft_arrow.library.delta import delta_products, near_duplicates
from tests.pico import pico_base


WIDTHS = {"a": (12, 9), "b": (7, 10)}


def make(name: str, seed: int, modules="ab", r: int = 3, dtype=torch.float32, **config) -> Adapter:
    """An adapter of small modules with random factors."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for module in modules:
        width, height = WIDTHS[module]
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.tensor(rng.standard_normal((r, width))).to(dtype)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.tensor(rng.standard_normal((height, r))).to(dtype)
    return Adapter(name, {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, **config}, tensors)


def dense(adapter: Adapter, scalings: dict[str, float]) -> np.ndarray:
    """All of delta W as one vector, by the definition; a module that is missing is zero."""
    parts = []
    for module, (width, height) in WIDTHS.items():
        key = f"base_model.model.{module}.lora_{{}}.weight"
        if key.format("A") not in adapter.tensors:
            parts.append(np.zeros(width * height))
            continue
        lora_A, lora_B = (adapter.tensors[key.format(half)].double().numpy() for half in "AB")
        parts.append(scalings[module] * (lora_B @ lora_A).ravel())
    return np.concatenate(parts)


@pytest.mark.parametrize("block", [1, 4, 512])
def test_products_are_those_of_the_dense_updates(monkeypatch, block):
    """Mixed ranks, missing modules, rank and alpha patterns, rslora; in blocks of any size; kept or read twice."""
    adapters = [
        make("plain", 1),
        make("small", 2, r=1),
        make("one module", 3, modules="b", r=5),
        make("pattern", 4, alpha_pattern={"a": 12}),
        make("rslora", 5, use_rslora=True),
    ]
    both = dict.fromkeys("ab", 2.0)
    scalings = [both, both, both, {"a": 4.0, "b": 2.0}, dict.fromkeys("ab", 6 / 3**0.5)]
    vectors = [dense(adapter, scaling) for adapter, scaling in zip(adapters, scalings, strict=True)]
    monkeypatch.setattr(delta, "BLOCK_RANKS", block)
    expected = np.array([[one @ other for other in vectors] for one in vectors])
    for kept in (0, 2**30):
        monkeypatch.setattr(delta, "KEPT_BYTES", kept)
        products = delta_products(adapters)
        assert products.dtype == np.float64
        np.testing.assert_allclose(products, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(delta_products(adapters, dtype=torch.float32), expected, rtol=1e-4, atol=1e-4)


def test_modules_of_other_widths_add_nothing():
    """The same name in another base."""
    other = Adapter(
        "other",
        {"peft_type": "LORA", "r": 2, "lora_alpha": 2},
        {"a.lora_A.weight": torch.ones(2, 5), "a.lora_B.weight": torch.ones(6, 2)},
    )
    assert delta_products([make("one", 1), other])[0, 1] == 0


def test_changed_bases_are_refused():
    """PiSSA's update is not in its files."""
    with pytest.raises(ValueError, match="does not follow from its files alone"):
        delta_products([make("pissa", 1, init_lora_weights="pissa")])


def test_twins_are_found_and_others_not():
    """Saved again in another dtype, with rotated factors, with alpha moved into the weights; half as long."""
    first = make("first", 1)
    rotation = torch.linalg.qr(torch.tensor(np.random.default_rng(9).standard_normal((3, 3)))).Q * 3.0
    turned = {}
    for key, tensor in first.tensors.items():
        turned[key] = (
            (rotation @ tensor.double()).float() if "lora_A" in key else (tensor.double() @ rotation.inverse()).float()
        )
    twins = {
        "bfloat16": replace(first, tensors={key: tensor.bfloat16() for key, tensor in first.tensors.items()}),
        "turned": replace(first, tensors=turned),
        "alpha": replace(
            first,
            config={**first.config, "lora_alpha": 3},
            tensors={key: tensor * (2 if "lora_B" in key else 1) for key, tensor in first.tensors.items()},
        ),
        "half": replace(first, config={**first.config, "lora_alpha": 3}),
    }
    names = ["first", "stranger", *twins]
    pairs = near_duplicates(names, delta_products([first, make("stranger", 2), *twins.values()]))
    found = {(pair.first, pair.second): pair for pair in pairs}
    assert {name for pair in found for name in pair} == {"first", *twins}
    assert len(found) == 10
    assert found["first", "turned"].distance < 1e-6 and found["first", "alpha"].distance < 1e-6
    assert 1e-4 < found["first", "bfloat16"].distance < 0.01
    assert found["first", "half"].distance == pytest.approx(0.5, abs=1e-6)
    assert pairs[0].distance == min(pair.distance for pair in pairs)


def trained(seed: int, order: int) -> Adapter:
    """Two layers of a pico base trained for a moment on one task; `order` is that of the rows."""
    torch.manual_seed(seed)
    model = get_peft_model(
        pico_base(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    generator = torch.Generator().manual_seed(order)
    for _ in range(30):
        start = torch.randint(5, 60, (8, 1), generator=generator)
        ids = start + torch.arange(12) * 3 % 40  # the task: count on in threes
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return Adapter.from_peft_model(model, name=f"seed{seed}-order{order}")


def test_two_trainings_of_one_task_are_no_twins():
    """Another seed, and even the same start with other rows."""
    adapters = [trained(1, 1), trained(1, 2), trained(2, 1)]
    assert near_duplicates([adapter.name for adapter in adapters], delta_products(adapters)) == ()


def test_a_zero_update_has_no_twins():
    """And divides by nothing."""
    zero = make("zero", 1)
    zero = replace(zero, tensors={key: torch.zeros_like(tensor) for key, tensor in zero.tensors.items()})
    assert near_duplicates(["zero", "one"], delta_products([zero, make("one", 1)])) == ()
