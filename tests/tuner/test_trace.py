"""trace_routing records what the layers did, and rows of a batch can be sent where one wants."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from peft_arrow import ArrowLoraModel
from tests.pico import pico_base
from tests.reference import read_experts, route


@pytest.fixture
def model(adapter_folders):
    """Three experts; q_proj has all, v_proj two, o_proj and down_proj one each."""
    return ArrowLoraModel.from_pretrained(pico_base(), adapter_folders, top_k=2)


@pytest.fixture
def ids():
    """Two rows of seven tokens."""
    return torch.randint(4, 100, (2, 7), generator=torch.Generator().manual_seed(3))


def test_trace_is_the_routing(model, adapter_folders, ids):
    """Positions and weights equal the formula's for each token; missing candidates are -1 with weight 0."""
    experts = read_experts(list(adapter_folders.values()))
    inputs = {}
    for name, layer in model.base_model.routed_layers().items():
        layer.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0].double().numpy()}))
    with model.trace_routing() as trace, torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert trace.expert_names == ["plurals", "dates", "sql"]
    assert set(trace) == set(experts)
    for name, module in trace.items():
        assert module.top_k_index.shape == (2, 7, 2) and module.top_k_index.dtype == torch.int64
        assert module.top_k_weights.dtype == torch.float32
        for b in range(2):
            for s in range(7):
                weights, _ = route(inputs[name][b, s], experts[name], 2)
                got = {
                    int(i): float(w)
                    for i, w in zip(module.top_k_index[b, s], module.top_k_weights[b, s], strict=True)
                    if i >= 0
                }
                assert got == pytest.approx(weights, abs=1e-4)
    single = trace["model.layers.0.self_attn.o_proj"]
    assert (single.top_k_index[..., 0] == 1).all() and (single.top_k_index[..., 1] == -1).all()
    assert (single.top_k_weights[..., 1] == 0).all()


def test_every_call_is_a_step_and_generate_has_many(model, ids):
    """Prefill first, then one step per new token; nothing is recorded outside the context."""
    with model.trace_routing() as trace:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert [next(iter(step.modules.values())).top_k_index.shape[1] for step in trace.steps] == [7, 1, 1]
    assert trace.steps[0].input_ids.shape == (2, 7)
    model(ids)
    assert len(trace.steps) == 3
    assert "plurals" in trace.table()


def test_shares_leave_out_padding(model, ids):
    """A padded batch gives the table of the unpadded one."""
    padded = torch.cat([torch.zeros(2, 5, dtype=ids.dtype), ids], dim=1)
    mask = (padded != 0).long()
    with torch.no_grad():
        with model.trace_routing() as short:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        with model.trace_routing() as long:
            model(input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    assert short.table() == long.table()


def test_recompute_of_a_checkpointed_layer_is_not_recorded(adapter_folders, ids):
    """The backward runs the layers again; the trace holds the forward only."""
    model = ArrowLoraModel.from_pretrained(pico_base(), adapter_folders, is_trainable=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    with model.trace_routing() as trace:
        model(input_ids=ids, labels=ids).loss.backward()
    assert len(trace.steps) == 1


def test_rows_go_where_they_are_sent(model, adapter_folders, ids):
    """adapter_names takes the adapter, an expert's name, or the bare base, one a row."""
    with torch.no_grad():
        routed, base = model(ids).logits, pico_base()(ids).logits
        plain = PeftModel.from_pretrained(pico_base(), adapter_folders["sql"])(ids).logits
        mixed = model(input_ids=ids, adapter_names=["default", "sql"]).logits
        assert float((mixed[0] - routed[0]).abs().max()) < 1e-5
        assert float((mixed[1] - plain[1]).abs().max()) < 1e-5
        mixed = model(input_ids=ids, adapter_names=["__base__", "default"]).logits
        assert float((mixed[0] - base[0]).abs().max()) < 1e-5
    with pytest.raises(ValueError, match="'nobody', which is not an adapter or expert"):
        model(input_ids=ids, adapter_names=["default", "nobody"])
    with pytest.raises(ValueError, match="training mode"):
        model.train()(input_ids=ids, adapter_names=["default", "sql"])


def test_generate_with_rows_and_beams(model, ids):
    """Beam search repeats a row, and with it its adapter."""
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    both = model.generate(input_ids=ids, adapter_names=["default", "default"], **options)
    assert torch.equal(both, model.generate(input_ids=ids, **options))
