"""Equal to PEFT's own `create_arrow_model` where that is right: equal ranks, and the same prototypes injected."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.arrow import create_arrow_model
from peft.tuners.lora.config import ArrowConfig

from peft_arrow import ArrowLoraModel
from tests.pico import pico_adapter, pico_base


@pytest.fixture(scope="module")
def equal_rank_folders(tmp_path_factory) -> list[str]:
    """Four adapters that PEFT's Arrow accepts."""
    root = tmp_path_factory.mktemp("equal-rank")
    return [
        pico_adapter(root / f"adapter-{i}", seed=30 + i, r=4, lora_alpha=4 + i, target_modules=["q_proj", "v_proj"])
        for i in range(4)
    ]


@pytest.fixture
def ids():
    """Two rows of eleven tokens."""
    return torch.randint(0, 100, (2, 11), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("top_k, temperature", [(1, 1.0), (2, 1.0), (4, 0.3)])
def test_same_prototypes_same_logits(equal_rank_folders, ids, top_k, temperature):
    """With our exact prototypes put into PEFT's layers both models agree within 1e-5."""
    ours = ArrowLoraModel.from_pretrained(pico_base(), equal_rank_folders, top_k=top_k, router_temperature=temperature)
    config = ArrowConfig(top_k=top_k, router_temperature=temperature, rng_seed=0)
    peft = create_arrow_model(pico_base(), equal_rank_folders, config).eval()
    with torch.no_grad():
        expected = ours(ids).logits
        assert float((expected - pico_base()(ids).logits).abs().max()) > 1e-3
        injected = 0
        for name, layer in ours.base_model.routed_layers().items():
            arrow = peft.base_model.model.get_submodule(name).lora_arrow["arrow_router"]
            arrow.register_buffer("prototypes", layer.arrow_lora_router["default"].weight.detach().clone())
            arrow._protos_ready = True
            injected += 1
        assert injected == 4
        assert float((peft(ids).logits - expected).abs().max()) < 1e-5


def test_one_expert_is_the_plain_adapter(equal_rank_folders, ids):
    """One expert and top_k=1: the routing weight is 1, so the logits are plain PEFT's."""
    for folder in equal_rank_folders:
        plain = PeftModel.from_pretrained(pico_base(), folder)
        routed = ArrowLoraModel.from_pretrained(pico_base(), [folder], top_k=1)
        with torch.no_grad():
            assert float((plain(ids).logits - routed(ids).logits).abs().max()) < 1e-5


def test_order_of_the_references_is_the_order_of_the_experts(equal_rank_folders, ids):
    """Permuting the adapters permutes the names and changes nothing else."""
    one = ArrowLoraModel.from_pretrained(pico_base(), equal_rank_folders, top_k=2)
    other = ArrowLoraModel.from_pretrained(pico_base(), equal_rank_folders[::-1], top_k=2)
    assert one.expert_names == other.expert_names[::-1]
    with torch.no_grad():
        assert float((one(ids).logits - other(ids).logits).abs().max()) < 1e-6
