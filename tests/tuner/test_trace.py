"""trace_routing records what the layers did, and rows of a batch can be sent where one wants."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_arrow import ArrowLoraConfig, ArrowLoraModel
from peft_arrow.tuner.trace_stats import all_sums
from tests.peers.bases import t5
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


def test_names_of_experts(model, ids):
    """The names are those of the indices, in prefill and in each decoding step."""
    with model.trace_routing() as trace:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    for step in trace.steps:
        for name, module in step.modules.items():
            for b, row in enumerate(module.experts):
                for s, experts in enumerate(row):
                    index = module.top_k_index[b, s].tolist()
                    assert experts == [None if i < 0 else model.expert_names[i] for i in index], name
    assert trace["model.layers.0.self_attn.o_proj"].experts[0][0] == ["dates", None]
    assert trace["model.layers.0.self_attn.v_proj"].candidates == (0, 1)


def test_rows_of_generated_texts(model, ids):
    """A row is the prompt and what was generated from it, but the last token, which no layer saw."""
    with model.trace_routing(tasks=["sql", "dates"]) as trace:
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    rows = trace.rows()
    assert [row.token_ids for row in rows] == out[:, :-1].tolist()
    assert [(row.task, row.num_prompt_tokens) for row in rows] == [("sql", 7), ("dates", 7)]
    for row in rows:
        name = "model.layers.1.self_attn.q_proj"
        parts = [step.modules[name].top_k_weights[row.row] for step in trace.steps]
        assert torch.equal(row.top_k_weights[name], torch.cat(parts))


def test_rows_that_ended_do_not_count(model, ids):
    """In a batch a text that has ended is padded until the others end; alone it would have ended there."""
    eos = int(model(input_ids=ids[:1]).logits[0, -1].argmax())
    model.generation_config.eos_token_id = eos
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), model.trace_routing() as trace:
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert out.shape[1] > 9 and (out[0, 8:] == 0).all() and out[0, 7] == eos
    first, second = trace.rows()
    assert first.token_ids == ids[0].tolist() and len(second.token_ids) > 8
    with torch.no_grad(), model.trace_routing() as alone:
        model.generate(input_ids=ids[:1], attention_mask=torch.ones_like(ids[:1]), **options)
    assert alone.rows()[0].token_ids == first.token_ids


def test_several_calls_and_their_tasks(model, ids):
    """Tasks may change between calls; the table is that of all tokens together."""
    with torch.no_grad(), model.trace_routing(["sql", "dates"]) as trace:
        model(input_ids=ids)
        trace.tasks = ["plurals"]
        model(input_ids=ids[:1, :3])
        trace.tasks = None
        model(input_ids=ids[1:])
    assert [(row.call, row.task) for row in trace.rows()] == [(0, "sql"), (0, "dates"), (1, "plurals"), (2, None)]
    assert set(trace.shares("task")) == {"sql", "dates", "plurals"}
    assert trace.agreement(by="task")["plurals"].tokens == 3 * 4  # q_proj and v_proj of two layers
    assert trace.agreement(by="task")["sql"].tokens == 7 * 4 and "by task" in trace.table()


def test_rows_that_are_sent_to_different_experts(model, ids):
    """Each row keeps its own place: routed, one expert, the bare base (nothing)."""
    ids = torch.cat([ids, ids[:1] + 1])
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    with torch.no_grad():
        with model.trace_routing() as routed:
            model(input_ids=ids, attention_mask=mask)
        with model.trace_routing(["x", "y", "z"]) as trace:
            model(input_ids=ids, attention_mask=mask, adapter_names=["__base__", "sql", "default"])
    assert len(trace.steps) == 1
    found, name = trace.steps[0].modules, "model.layers.0.self_attn.q_proj"
    assert (found[name].top_k_index[0] == -1).all() and (found[name].top_k_weights[0] == 0).all()
    assert found[name].experts[1] == [["sql", None]] * 7
    assert torch.equal(found[name].top_k_index[2], routed[name].top_k_index[2])
    assert torch.equal(found[name].top_k_weights[2], routed[name].top_k_weights[2])
    assert [row.token_ids for row in trace.rows()] == [ids[0].tolist(), ids[1, 1:].tolist(), ids[2].tolist()]
    shares = trace.shares("task")
    assert shares["x"] == [0, 0, 0] and shares["y"] == [0, 0, 1] and sum(shares["z"]) == pytest.approx(1)


def test_pinned_experts(model, ids):
    """What the caller chose is what is recorded."""
    with torch.no_grad(), model.pin_experts([None, {"plurals": 0.25, "sql": 0.75}]), model.trace_routing() as trace:
        model(input_ids=ids)
    first, second = trace.rows()
    name = "model.layers.0.self_attn.q_proj"
    assert first.experts(name) == [{}] * 7 and second.experts(name) == [{"sql": 0.75, "plurals": 0.25}] * 7
    assert second.experts("model.layers.0.self_attn.v_proj") == [{"plurals": 0.25}] * 7


def test_the_null_expert_and_masked_experts(model, ids):
    """The bare base is the last name while it is a candidate; a masked expert is none."""
    model.set_router("arrow", top_k=2, null_expert=0.5, masked_experts=["dates"])
    with torch.no_grad(), model.trace_routing(["plurals", "sql"]) as trace:
        model(input_ids=ids)
    assert trace.expert_names == ["plurals", "dates", "sql", "__base__"]
    assert model.expert_names == ["plurals", "dates", "sql"]
    name = "model.layers.0.self_attn.q_proj"
    assert trace[name].candidates == (0, 2, 3) and trace["model.layers.0.self_attn.o_proj"].candidates == (3,)
    names = {each for row in trace[name].experts for token in row for each in token}
    assert "__base__" in names and "dates" not in names
    share = trace.shares("kind")
    assert share["o_proj"] == [0, 0, 0, 1] and share["q_proj"][1] == 0 and share["q_proj"][3] > 0
    assert trace.agreement(by="kind")["q_proj"].chance == pytest.approx(1 / 3) and "__base__" in trace.table()
    model.set_router("arrow", null_expert=None, masked_experts=None)
    with torch.no_grad(), model.trace_routing() as trace:
        model(input_ids=ids)
    assert trace.expert_names == ["plurals", "dates", "sql"]


@pytest.mark.parametrize("options", [{"top_p": 0.6}, {"granularity": "sequence"}, {"tied": True}])
def test_options_of_the_selection(options, model, ids):
    """Weights sum to 1 where something is kept, and one choice a request is the same for all its tokens."""
    model.set_router("arrow", top_k=2, **options)
    with model.trace_routing() as trace:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    for row in trace.rows():
        for name, weights in row.top_k_weights.items():
            assert weights.sum(-1).tolist() == pytest.approx([1.0] * 9)
            assert (weights[row.top_k_index[name] < 0] == 0).all()
            if "granularity" in options:
                assert (row.top_k_index[name] == row.top_k_index[name][0]).all()


def test_tasks_that_do_not_fit_the_batch(model, ids):
    with (
        model.trace_routing(tasks=["a", "b", "c"]),
        pytest.raises(ValueError, match="tasks has 3 names for a batch of 2"),
    ):
        model(input_ids=ids)
    with model.trace_routing(tasks=[]), pytest.raises(ValueError, match="tasks has 0 names"):
        model(input_ids=ids)


def test_traces_inside_each_other(model, ids):
    """Both record; the outer one goes on when the inner one is closed."""
    with torch.no_grad(), model.trace_routing() as outer:
        model(input_ids=ids)
        with model.trace_routing() as inner:
            model(input_ids=ids)
        model(input_ids=ids)
    assert (len(outer.steps), len(inner.steps)) == (3, 1)
    assert outer.table() == inner.table()


def test_threads_have_calls_of_their_own(model):
    """Two threads that call the model in turns: no module of one lands in a step of the other."""
    texts = {number: torch.full((1, number + 2), 10 + number) for number in range(8)}
    with model.trace_routing() as trace, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: model(input_ids=texts[number]), texts))
    assert len(trace.steps) == 8
    assert all(len(step.modules) == 8 for step in trace.steps)
    assert sorted(row.token_ids for row in trace.rows()) == [[10 + n] * (n + 2) for n in texts]
    for step in trace.steps:
        assert all(module.top_k_index.shape[:2] == step.input_ids.shape for module in step.modules.values())


def test_an_error_inside_leaves_nothing_open(model, ids):
    with pytest.raises(RuntimeError, match="boom"), model.trace_routing():
        raise RuntimeError("boom")
    assert all(layer.recorder is None for layer in model.base_model.routed_layers().values())
    model(input_ids=ids)


def test_a_part_that_is_called_alone_has_unknown_tokens(model, ids):
    """Its tokens are not those of the call before, whose mask and ids would be wrong for them."""
    inner = model.base_model.model.model
    with torch.no_grad(), model.trace_routing() as trace:
        model(input_ids=ids, attention_mask=(ids > 50).long())
        inner(input_ids=ids)
    known, unknown = trace.rows()[:2], trace.rows()[2:]
    assert sum(len(row.token_ids) for row in known) == int((ids > 50).sum())
    assert [row.token_ids for row in unknown] == [[None] * 7] * 2


@pytest.mark.parametrize("is_generated", [False, True])
def test_encoder_and_decoder_have_tokens_of_their_own(is_generated):
    """T5: the padding of the encoder's text is left out there and in cross-attention, not in the decoder."""
    base = t5()
    options = {
        "task_type": "SEQ_2_SEQ_LM",
        "num_experts": 3,
        "target_modules": ["q", "k", "wi"],
        "init_weights": False,
    }
    model = get_peft_model(base, ArrowLoraConfig(top_k=2, **options)).eval()
    ids, mask = torch.tensor([[0, 5, 6, 7], [8, 9, 10, 11]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    with torch.no_grad(), model.trace_routing(["a", "b"]) as trace:
        if is_generated:
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False
            )
            decoded = out[:, :-1]
        else:
            decoded = torch.tensor([[0, 12], [0, 13]])
            model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoded)
    rows = {(row.stream, row.task): row for row in trace.rows()}
    assert {key: row.token_ids for key, row in rows.items() if key[0] == "encoder"} == {
        ("encoder", "a"): [5, 6, 7],
        ("encoder", "b"): [8, 9, 10, 11],
    }
    assert [rows["decoder", task].token_ids for task in "ab"] == decoded.tolist()
    cross = [name for name in trace.shares("module") if "EncDecAttention.k" in name]
    counted = {name: sums.tokens for (task, name), sums in all_sums(trace).items() if task == "a"}
    assert cross and all(counted[name] == 3 for name in cross)
    assert counted["decoder.block.0.layer.0.SelfAttention.q"] == decoded.shape[1]


@pytest.mark.slow
def test_a_compiled_model_is_traced(model, ids):
    """The hooks run outside of the graph, so that the trace of a compiled model is that of the model."""
    model.build_prototypes()
    with torch.no_grad(), model.trace_routing() as plain:
        model(input_ids=ids)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(input_ids=ids)
        with model.trace_routing(["sql", "dates"]) as trace:
            for _ in range(2):
                compiled(input_ids=ids)
    assert len(trace.steps) == 2
    assert [row.token_ids for row in trace.rows()] == ids.tolist() * 2
    assert all(torch.equal(trace[name].top_k_index, plain[name].top_k_index) for name in plain)


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
