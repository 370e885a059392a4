"""A.13 and A.14: generation and padding, which work in PEFT's Arrow, work here."""

from __future__ import annotations

import pytest
import torch
from transformers import pipeline

from ..pico import pico_adapter, pico_base, pico_tokenizer
from .adapters import TOLERANCE, VISIBLE, difference, logits, routed
from .bases import llama, token_ids


GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def model(trio):
    model = routed(trio, top_k=2)
    assert difference(logits(model), logits(llama())) > VISIBLE
    return model


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}, {}],
    ids=["beams", "static cache", "prompt lookup", "greedy"],
)
@pytest.mark.filterwarnings("default")  # transformers' own, about compiling with a static cache
def test_caches_change_nothing(model, options):
    """Each way of decoding gives the tokens of the same search without a cache."""
    rows = 1 if "prompt_lookup_num_tokens" in options else 2
    ids = token_ids(rows=rows)
    beams = {"num_beams": options.get("num_beams", 1)}
    expected = model.generate(input_ids=ids, use_cache=False, **GREEDY, **beams)
    assert torch.equal(model.generate(input_ids=ids, **GREEDY, **options), expected)
    assert not torch.equal(expected, llama().generate(input_ids=ids, **GREEDY, **beams)), (
        "the adapters must be visible"
    )


@pytest.mark.parametrize(("target", "assistant"), [("base", "routed"), ("routed", "base")])
def test_assisted_decoding(model, target, assistant):
    ids = token_ids(rows=1)
    models = {"base": llama(), "routed": model}
    found = models[target].generate(input_ids=ids, assistant_model=models[assistant], **GREEDY)
    assert torch.equal(found, models[target].generate(input_ids=ids, **GREEDY))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(model, side):
    short, long = token_ids(rows=1, length=5), token_ids(rows=1, length=9, seed=8)
    padding = torch.zeros(1, 4, dtype=torch.int64)
    real = slice(4, None) if side == "left" else slice(None, 5)
    padded = torch.cat([padding, short] if side == "left" else [short, padding], dim=1)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0] = (padded[0] != 0).long()
    batch = {"input_ids": torch.cat([padded, long]), "attention_mask": mask}
    batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    found = logits(model, **batch)
    assert difference(found[:1, real], logits(model, input_ids=short)) <= TOLERANCE
    assert difference(found[1:], logits(model, input_ids=long)) <= TOLERANCE


def test_padding_is_left_out_of_shares(model):
    """Padding is routed like any token, and the table does not count it."""
    ids, mask = token_ids(rows=2), torch.ones(2, 9, dtype=torch.int64)
    with model.trace_routing() as without:
        model(ids, attention_mask=mask)
    padded = torch.cat([ids, torch.zeros(2, 50, dtype=torch.int64)], dim=1)
    with model.trace_routing() as with_padding:
        model(padded, attention_mask=torch.cat([mask, torch.zeros(2, 50, dtype=torch.int64)], dim=1))
    assert with_padding.table() == without.table()


def test_batch_invariance(model):
    ids = token_ids(rows=4)
    together = logits(model, input_ids=ids)
    for row in range(4):
        assert difference(logits(model, input_ids=ids[row : row + 1]), together[row : row + 1]) <= TOLERANCE


@pytest.mark.filterwarnings("default")  # transformers' own, about generation settings
def test_text_generation_pipeline(tmp_path):
    folder = pico_adapter(tmp_path / "one", seed=1, r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"])
    tokenizer = pico_tokenizer()
    model = routed([folder], pico_base)
    answer = pipeline("text-generation", model=model, tokenizer=tokenizer)("plural of fish:", **GREEDY)
    ids = tokenizer("plural of fish:", return_tensors="pt").input_ids
    expected = tokenizer.decode(model.generate(input_ids=ids, **GREEDY)[0], skip_special_tokens=True)
    assert answer[0]["generated_text"] == expected
