"""Adapters, rows and the comparison that the tests of routers share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_arrow import ArrowLoraModel
from tests.pico import pico_adapter, pico_base
from tests.reference import read_experts, routed_update
from tests.tuner.test_formula import captured_updates


TIE = 1e-5
SHAPES = {
    "plurals": {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"]},
    "dates": {"r": 8, "target_modules": "all-linear", "lora_alpha": 1, "use_rslora": True},
    "sql": {"r": 2, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "roman": {"r": 3, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "rank_pattern": {"q_proj": 5}},
    "euro": {"r": 4, "target_modules": ["q_proj", "v_proj", "o_proj"], "lora_alpha": 1},
}


@pytest.fixture(scope="session")
def mixed(tmp_path_factory) -> dict[str, str]:
    """Five adapters with different ranks, modules, layers and alphas, as name -> folder."""
    root = tmp_path_factory.mktemp("routers")
    return {name: pico_adapter(root / name, seed=40 + i, **shape) for i, (name, shape) in enumerate(SHAPES.items())}


@pytest.fixture
def ids():
    """Two rows of nine tokens."""
    return torch.randint(4, 100, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def rows():
    """Four rows of data for every expert, each with words of its own."""
    return {
        name: [{"prompt": f"{name} number {i}:", "completion": f" {name[::-1]}{i}"} for i in range(4)]
        for name in SHAPES
    }


@pytest.fixture
def model(mixed):
    """A routed model of the five."""
    return ArrowLoraModel.from_pretrained(pico_base(), mixed, top_k=2)


@pytest.fixture
def compare(mixed):
    """(model, ids, weigh) -> largest difference of a layer's update to the formula's, over the largest logit.

    `weigh(module, row, token, x, experts)` gives ({position: weight}, gap); tokens with a gap below 1e-5 are left out,
    and have to be few.
    """
    experts = read_experts(list(mixed.values()))

    def run(model, ids, weigh, aggregation="output", most_tied=0.02):
        updates, largest = captured_updates(model, ids)
        worst, tied, tokens = 0.0, 0, 0
        for module, (x, delta) in updates.items():
            for place in range(len(x)):
                tokens += 1
                row, token = divmod(place, ids.shape[1])
                weights, gap = weigh(module, row, token, x[place], experts[module])
                if gap < TIE:
                    tied += 1
                    continue
                weights = {p: w for p, w in weights.items() if p in experts[module]}
                expected = routed_update(x[place], experts[module], weights, aggregation) if weights else 0.0
                worst = max(worst, float(np.abs(delta[place] - expected).max()))
        assert tied / tokens < most_tied
        return worst / largest

    return run
