"""Paged experts give what unpaged ones give, bit for bit on disk, and lie where they should."""

from __future__ import annotations

import copy
import gc
import pickle
import threading

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open

from peft_arrow import ArrowLoraConfig, ArrowLoraModel
from peft_arrow.tuner import ArrowLoraLayer, hot_set, paged_layer
from peft_arrow.tuner.bank import PagedLinear
from tests.pico import pico_adapter, pico_base


RANKS = (4, 8, 2)
IDS = torch.randint(0, 100, (2, 11), generator=torch.Generator().manual_seed(3))
Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    """Ten adapters of mixed ranks on all linear modules; the last one on one module only."""
    root = tmp_path_factory.mktemp("paged")
    made = [
        pico_adapter(root / f"a{i}", seed=i, r=RANKS[i % 3], target_modules="all-linear", lora_dropout=0.1)
        for i in range(9)
    ]
    return [*made, pico_adapter(root / "a9", seed=9, r=5, lora_alpha=3, target_modules=["q_proj"])]


@pytest.fixture(scope="module")
def equal_folders(tmp_path_factory) -> list[str]:
    """Eight adapters of one rank, as parameter aggregation needs."""
    root = tmp_path_factory.mktemp("equal")
    return [pico_adapter(root / f"a{i}", seed=i, r=4, lora_alpha=1 + i, target_modules="all-linear") for i in range(8)]


@pytest.fixture
def slots(monkeypatch):
    """As if experts rested on another device than the one that computes."""
    monkeypatch.setattr(paged_layer, "needs_slots", lambda resting, computing: True)


@pytest.fixture(params=["at hand", "in slots"])
def way(request, monkeypatch):
    """Both ways of using paged experts."""
    if request.param == "in slots":
        monkeypatch.setattr(paged_layer, "needs_slots", lambda resting, computing: True)
    return request.param


@pytest.fixture(params=["cpu", "folder"])
def store(request, tmp_path) -> str:
    """Both stores."""
    return "cpu" if request.param == "cpu" else str(tmp_path / "store")


def logits_of(model, ids=IDS, **kwargs) -> torch.Tensor:
    """Logits without gradients."""
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def expected_of(folders, **options):
    """An unpaged model with the kernel that is the definition."""
    model = ArrowLoraModel.from_pretrained(pico_base(), folders, **options)
    model.set_kernel("eager")
    return model


def assert_close(found, expected) -> None:
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def assert_layers_agree(model, expected) -> None:
    """Layer by layer, because through layers this model makes 1e-3 of the 1e-7 between any two kernels."""
    layers = expected.base_model.routed_layers()
    for name, layer in model.base_model.routed_layers().items():
        x = torch.randn(2, 9, layer.in_features)
        with torch.no_grad():
            assert_close(layer(x), layers[name](x))


def paged_parameters(model) -> dict[str, torch.Tensor]:
    return {name: m.weight for name, m in model.named_modules() if isinstance(m, PagedLinear)}


@pytest.mark.parametrize("hot", [1, 2, 64])
@pytest.mark.parametrize("kernel", ["auto", "eager", "folded", "gather", "grouped"])
def test_logits_are_those_of_the_unpaged_model(folders, store, way, kernel, hot):
    """Also with fewer slots than `top_k`, and than a call's tokens choose."""
    model = ArrowLoraModel.from_pretrained(pico_base(), folders, top_k=3, expert_store=store, hot_experts=hot)
    model.set_kernel(kernel)
    expected = expected_of(folders, top_k=3)
    assert_close(logits_of(model), logits_of(expected))
    assert_close(logits_of(model, IDS[:1, :1]), logits_of(expected, IDS[:1, :1]))
    layer = model.get_submodule(Q)
    made = layer.pages["default"].slots
    assert (made is not None) == (way == "in slots")
    if made is not None:
        assert len(made.slot_of) <= min(hot, 10) == len(made.A_HrI) == len(made.B_HrO)


@pytest.mark.parametrize("hot", [1, 3, 64])
def test_aggregation_of_parameters(equal_folders, slots, hot):
    """Its parts are tokens, because a token's factors are mixed before they are applied."""
    options = {"top_k": 3, "aggregation": "parameter"}
    model = ArrowLoraModel.from_pretrained(pico_base(), equal_folders, expert_store="cpu", hot_experts=hot, **options)
    assert_close(logits_of(model), logits_of(expected_of(equal_folders, **options)))


@pytest.mark.parametrize(
    "options",
    [
        *({"router": name} for name in ("spectr", "norm", "lag", "uniform", "random")),
        {"granularity": "sequence"},
        {"tied": True},
        {"top_p": 0.5},
        {"null_expert": 0.0},
        {"masked_experts": ["a1", "a4"]},
        {"router_temperature": 0.3},
    ],
    ids=str,
)
def test_every_router_and_selection(folders, way, options):
    """A whole answer, so that what is merged for decoding is used."""
    options = {"top_k": 2, **options}
    model = ArrowLoraModel.from_pretrained(pico_base(), folders, expert_store="cpu", hot_experts=3, **options)
    expected = expected_of(folders, **options)
    assert_layers_agree(model, expected)
    if options.get("router") == "random":
        return  # goes by the bits of its inputs
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(input_ids=IDS, **settings), expected.generate(input_ids=IDS, **settings))


def test_calibrated(folders, way):
    model = ArrowLoraModel.from_pretrained(pico_base(), folders, top_k=2, expert_store="cpu", hot_experts=3)
    expected = expected_of(folders, top_k=2)
    for one in (model, expected):
        one.calibrate_router(sequences=8, length=24)
    assert_layers_agree(model, expected)


@pytest.mark.parametrize(
    ("router", "options"), [("centroid", {}), ("task_predictor", {}), ("retrieval", {}), ("phatgoose", {"steps": 2})]
)
def test_fitted(folders, way, tokenizer, router, options):
    """Fitting runs the model, and PHATGOOSE trains through it."""
    model = ArrowLoraModel.from_pretrained(pico_base(), folders, top_k=2, expert_store="cpu", hot_experts=3)
    expected = expected_of(folders, top_k=2)
    names = model.active_peft_config.expert_names
    data = {name: [{"prompt": f"{name} {i}:", "completion": " x"} for i in range(3)] for name in names}
    for one in (model, expected):
        torch.manual_seed(0)
        one.fit_router(router, data, tokenizer=tokenizer, **options)
    assert_close(logits_of(model), logits_of(expected))


def test_rows_sent_to_experts_and_pins(folders, way):
    model = ArrowLoraModel.from_pretrained(pico_base(), folders, top_k=2, expert_store="cpu", hot_experts=2)
    expected = expected_of(folders, top_k=2)
    for names in (["a1", "a9"], ["__base__", "a2"], ["default", "a0"]):
        assert_close(logits_of(model, adapter_names=names), logits_of(expected, adapter_names=names))
    rows = [{f"a{i}": 0.2 for i in range(6)}, "a9"]
    with model.pin_experts(rows), expected.pin_experts(rows):
        assert_close(logits_of(model), logits_of(expected))
    with model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(pico_base()))
    for one in (model, expected):
        one.set_scale(0.25)
    assert_close(logits_of(model), logits_of(expected))


def test_the_least_recently_used_is_replaced(folders, slots):
    model = ArrowLoraModel.from_pretrained(pico_base(), folders, top_k=1, expert_store="cpu", hot_experts=3)
    layer = model.get_submodule(Q)

    def ask(*experts) -> None:
        tokens = torch.randn(len(experts), 32)
        index = torch.tensor(experts).unsqueeze(1)
        found = layer.apply_experts("default", tokens, index, torch.ones(len(experts), 1))
        for token, expert, one in zip(tokens, experts, found, strict=True):
            lora_A, lora_B = layer.expert_factors("default")[expert]
            assert_close(one, layer.experts["default"].scalings[expert] * (lora_B @ (lora_A @ token)))

    with torch.no_grad():
        ask(0, 1, 2)
        kept = layer.pages["default"].slots
        assert list(kept.slot_of) == [0, 1, 2]
        places = dict(kept.slot_of)
        ask(0)
        ask(5)
        assert list(kept.slot_of) == [2, 0, 5] and kept.slot_of[5] == places[1] and kept.slot_of[0] == places[0]
        ask(2)
        ask(7, 8)
        assert list(kept.slot_of) == [2, 7, 8]
        ask(3, 2, 9, 1, 0)
        assert len(kept.slot_of) == 3 and layer.pages["default"].slots is kept
        ask(2, 2, 9)


def test_only_the_missing_are_copied(folders, slots, monkeypatch):
    copied, original = [], hot_set.Slots._copy
    monkeypatch.setattr(hot_set.Slots, "_copy", lambda self, e, slot: (copied.append(e), original(self, e, slot)))
    model = ArrowLoraModel.from_pretrained(pico_base(), folders, top_k=2, expert_store="cpu", hot_experts=64)
    first = logits_of(model)
    assert copied
    copied.clear()
    assert torch.equal(logits_of(model), first) and not copied
    layer = model.get_submodule(Q)
    with torch.no_grad():
        layer.arrow_lora_A["default"].weight.mul_(2.0)
    changed = logits_of(model)
    assert copied and not torch.equal(changed, first)
    model.set_kernel("eager")
    assert_close(logits_of(model), changed)


def test_saved_bit_for_bit_as_unpaged(folders, store, tmp_path):
    plain = ArrowLoraModel.from_pretrained(pico_base(), folders, top_k=2)
    model = ArrowLoraModel.from_pretrained(pico_base(), folders, top_k=2, expert_store=store)
    for one, name in ((plain, "plain"), (model, "paged")):
        one.save_pretrained(tmp_path / name)
        one.export_lora(tmp_path / f"{name}-lora")
    for name in ("{}/adapter_config.json", "{}/adapter_model.safetensors", "{}-lora/adapter_model.safetensors"):
        paged, unpaged = ((tmp_path / name.format(side)).read_bytes() for side in ("paged", "plain"))
        assert paged == unpaged, name
    for layer, other in zip(model.base_model.routed_layers().values(), plain.base_model.routed_layers().values()):
        for ours, theirs in zip(layer.expert_factors("default"), other.expert_factors("default"), strict=True):
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    again = PeftModel.from_pretrained(pico_base(), tmp_path / "paged", adapter_name="again")
    assert not again.base_model.expert_stores and torch.equal(logits_of(again), logits_of(plain))
    again.page_experts(store, hot_experts=2)
    assert_close(logits_of(again), logits_of(plain))


def test_page_and_unpage_a_live_model(folders, store, tmp_path):
    model = ArrowLoraModel.from_pretrained(pico_base(), folders, top_k=2)
    before = logits_of(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.page_experts(store, hot_experts=2)
    assert len(paged_parameters(model)) == 2 * 14
    with pytest.raises(ValueError, match="unpage_experts"):
        model.page_experts("cpu")
    assert_close(logits_of(model), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model.unpage_experts()
    assert not paged_parameters(model) and torch.equal(logits_of(model), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="not paged"):
        model.unpage_experts()


def test_paging_keeps_the_prototypes(folders, monkeypatch):
    """They are not built again because factors moved."""
    model = ArrowLoraModel.from_pretrained(pico_base(), folders, top_k=2)
    model.build_prototypes()
    monkeypatch.setattr("peft_arrow.tuner.prototypes.top_right_singular_vectors", None)
    model.page_experts("cpu")
    logits_of(model)
    model.unpage_experts()
    logits_of(model)


def test_editing(folders, store, way):
    model = ArrowLoraModel.from_pretrained(pico_base(), folders[:6], top_k=2, expert_store=store, hot_experts=3)
    logits_of(model)
    model.add_expert(folders[9], name="new")
    model.remove_expert("a2")
    names = ["a0", "a1", "a3", "a4", "a5", "new"]
    sources = [*(folders[i] for i in (0, 1, 3, 4, 5)), folders[9]]
    assert model.expert_names == names
    expected = expected_of(dict(zip(names, sources, strict=True)), top_k=2)
    assert_close(logits_of(model), logits_of(expected))
    assert len(paged_parameters(model)) == 2 * 14
    model.unpage_experts()
    assert_close(logits_of(model), logits_of(expected))


def test_several_adapters_in_one_folder(folders, tmp_path, way):
    """Each has its own file; deleting one leaves the other."""
    model = ArrowLoraModel.from_pretrained(pico_base(), folders[:4], top_k=2, expert_store=tmp_path, hot_experts=2)
    model.add_adapter("second", ArrowLoraConfig(adapters=folders[4:], top_k=2, inference_mode=True))
    first = logits_of(model)
    model.set_adapter("second")
    model.page_experts(tmp_path, hot_experts=2)
    assert len(list(tmp_path.iterdir())) == 2
    assert_close(logits_of(model), logits_of(expected_of(folders[4:], top_k=2)))
    model.set_adapter("default")
    assert torch.equal(logits_of(model), first)
    assert not any(p.requires_grad for p in paged_parameters(model).values())
    model.delete_adapter("second")
    (left,) = tmp_path.iterdir()
    assert left == model.base_model.expert_stores["default"].file.path
    assert torch.equal(logits_of(model), first)


def test_copies_hold_their_own_experts(folders, store, way, tmp_path):
    model = ArrowLoraModel.from_pretrained(pico_base(), folders, top_k=2, expert_store=store, hot_experts=3)
    expected = logits_of(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]  # noqa: S301
    model.unpage_experts()
    for one in copies:
        assert torch.equal(logits_of(one), expected) and len(paged_parameters(one)) == 2 * 14
        one.unpage_experts()
        assert_close(logits_of(one), expected)


def test_frozen_experts_beside_trained_ones(folders, way):
    """Gradients of the experts that train, and of the base's inputs, are those of the unpaged model."""
    grads = []
    for paged in ({}, {"expert_store": "cpu", "hot_experts": 2}):
        options = {"top_k": 3, "is_trainable": True, "trainable_experts": ["a1", "a3"], **paged}
        model = ArrowLoraModel.from_pretrained(pico_base(), folders, **options).eval()
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        frozen = paged_parameters(model)
        assert len(frozen) == (2 * 14 if paged else 0) and not any(p.requires_grad for p in frozen.values())
    assert grads[0].keys() == grads[1].keys() and all("frozen" not in name for name in grads[0])
    for name, grad in grads[0].items():
        assert float((grads[1][name] - grad).abs().max()) <= 1e-4 * float(grad.abs().max()), name


def test_training_mode_with_dropout_runs(folders, slots):
    options = {"is_trainable": True, "trainable_experts": ["a1"], "expert_store": "cpu", "hot_experts": 2}
    model = ArrowLoraModel.from_pretrained(pico_base(), folders, top_k=3, **options)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_what_trains_is_not_paged(folders, tmp_path):
    with pytest.raises(ValueError, match="trainable"):
        ArrowLoraModel.from_pretrained(pico_base(), folders, is_trainable=True, expert_store=tmp_path / "store")
    model = ArrowLoraModel.from_pretrained(pico_base(), folders, is_trainable=True)
    with pytest.raises(ValueError, match="trainable"):
        model.page_experts(tmp_path / "store")
    assert not (tmp_path / "store").exists() and not paged_parameters(model)


def test_activating_a_paged_adapter_does_not_make_it_trainable(folders):
    model = ArrowLoraModel.from_pretrained(pico_base(), folders, expert_store="cpu")
    model.set_adapter("default")
    assert not any(p.requires_grad for p in paged_parameters(model).values())


def test_training_paged_experts_is_refused(folders, way):
    model = ArrowLoraModel.from_pretrained(pico_base(), folders, top_k=2, expert_store="cpu")
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="unpage_experts"):
        model(input_ids=IDS)
    logits_of(model)


@pytest.mark.parametrize("hot", [0, -1, 2.0, True, None])
def test_hot_experts_is_checked(folders, hot):
    model = ArrowLoraModel.from_pretrained(pico_base(), folders)
    with pytest.raises(ValueError, match=f"hot_experts={hot!r}.*at least 1"):
        model.page_experts("cpu", hot_experts=hot)


@pytest.mark.parametrize("store", ["cuda", "cuda:0", "meta", "", 3, None])
def test_store_is_checked(folders, store):
    model = ArrowLoraModel.from_pretrained(pico_base(), folders)
    with pytest.raises(ValueError, match="'cpu' or a folder"):
        model.page_experts(store)


def test_a_change_of_dtype_is_refused_and_changes_nothing(folders, store):
    model = ArrowLoraModel.from_pretrained(pico_base(), folders, top_k=2, expert_store=store)
    before = logits_of(model)
    for change in (model.half, lambda: model.to(torch.bfloat16), model.double):
        with pytest.raises(ValueError, match="unpage_experts"):
            change()
    assert torch.equal(logits_of(model), before)
    assert torch.equal(logits_of(model.to("cpu")), before) and len(paged_parameters(model)) == 2 * 14


@pytest.mark.parametrize("autocast", [True, False])
def test_low_precision(folders, store, way, autocast):
    """Paged factors have the dtype that unpaged ones get."""
    options = {"top_k": 3, "autocast_adapter_dtype": autocast}
    model = ArrowLoraModel.from_pretrained(
        pico_base().bfloat16(), folders, expert_store=store, hot_experts=2, **options
    )
    plain = ArrowLoraModel.from_pretrained(pico_base().bfloat16(), folders, **options)
    dtypes = {p.dtype for p in paged_parameters(model).values()}
    assert dtypes == {torch.float32 if autocast else torch.bfloat16}
    assert dtypes == {p.dtype for name, p in plain.named_parameters() if "arrow_lora_A" in name}
    layer, other = model.get_submodule(Q), plain.get_submodule(Q)
    x = torch.randn(2, 9, 32).bfloat16()
    with torch.no_grad():
        found, expected = layer(x).float(), other(x).float()
    assert float((found - expected).abs().max()) <= 2e-2 * float(expected.abs().max())


def test_loading_over_a_paged_adapter(folders, store, slots, tmp_path):
    """The weights of the file take the place of those there, in the store and in the slots."""
    other = ArrowLoraModel.from_pretrained(pico_base(), folders, top_k=2)
    for name, p in other.named_parameters():
        if "arrow_lora_B" in name:
            p.data.mul_(-0.5)
    other.refresh_prototypes()
    other.save_pretrained(tmp_path / "other")
    model = ArrowLoraModel.from_pretrained(pico_base(), folders, top_k=2, expert_store=store, hot_experts=3)
    logits_of(model)
    model.load_adapter(tmp_path / "other", "default")
    model.eval()
    assert_close(logits_of(model), logits_of(other))


def test_threads_do_not_mix(folders, slots):
    model = ArrowLoraModel.from_pretrained(pico_base(), folders, top_k=2, expert_store="cpu", hot_experts=2)
    inputs = [torch.randint(0, 60, (1, 5 + n), generator=torch.Generator().manual_seed(n)) for n in range(4)]
    expected = [logits_of(model, ids) for ids in inputs]
    found = [None] * len(inputs)

    def run(place: int) -> None:
        for _ in range(4):
            found[place] = logits_of(model, inputs[place])

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, alone in zip(found, expected, strict=True):
        assert_close(one, alone)


def test_inference_mode_first(folders, slots):
    model = ArrowLoraModel.from_pretrained(pico_base(), folders, top_k=2, expert_store="cpu", hot_experts=2)
    with torch.inference_mode():
        first = model(input_ids=IDS).logits.clone()
    assert_close(logits_of(model), first)
    with torch.inference_mode():
        assert_close(model(input_ids=IDS).logits, first)


def test_compiled(folders, way):
    """Slots break the graph, which is allowed where `fullgraph` is not asked for."""
    model = ArrowLoraModel.from_pretrained(pico_base(), folders, top_k=2, expert_store="cpu", hot_experts=3)
    expected = logits_of(model)
    layer = torch.compile(model, backend="eager")
    assert_close(logits_of(layer), expected)
    torch._dynamo.reset()


def test_bytes_of_an_expert(folders, tmp_path, slots):
    """Of each module rank x (I + O) numbers in the store, 4 I of prototypes, and slots of the largest rank."""
    model = ArrowLoraModel.from_pretrained(pico_base(), folders, top_k=2, expert_store=tmp_path, hot_experts=4)
    logits_of(model)
    modules = {n: (m.in_features, m.out_features) for n, m in pico_base().named_modules() if hasattr(m, "in_features")}
    del modules["lm_head"]
    ranks = {name: [RANKS[i % 3] for i in range(9)] + [5] * name.endswith("q_proj") for name in modules}
    stored = sum(4 * rank * sum(modules[name]) for name in modules for rank in ranks[name])
    prototypes = sum(4 * modules[name][0] * len(ranks[name]) for name in modules)
    hot = sum(4 * 4 * max(ranks[name]) * sum(modules[name]) for name in modules)
    layers = [m for m in model.modules() if isinstance(m, ArrowLoraLayer)]
    (file,) = tmp_path.iterdir()
    data = file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
    with safe_open(file, "pt") as written:
        values = {name: written.get_tensor(name) for name in written.keys()}  # noqa: SIM118
    parameters = paged_parameters(model)
    assert data == stored == sum(value.nbytes for value in values.values())
    assert stored == sum(p.untyped_storage().nbytes() for p in parameters.values())
    assert len({p.untyped_storage().data_ptr() for p in parameters.values()}) == 2 * len(layers) == len(values)
    assert torch.equal(
        values["model.layers.0.self_attn.q_proj.main.lora_B_t"].t(), parameters[f"{Q}.arrow_lora_B.default"]
    )
    assert prototypes == sum(layer.arrow_lora_router["default"].weight.untyped_storage().nbytes() for layer in layers)
    for layer, name in zip(layers, modules, strict=True):
        (fields,) = (fields for _, fields in layer._columns("default", torch.device("cpu")))
        tables = [value for value in vars(fields["constants"]).values() if isinstance(value, torch.Tensor)]
        largest = (len(ranks[name]) + 1) * max(ranks[name])
        assert sum(table.nbytes for table in tables) == 12 * sum(ranks[name]) + 12 * largest
    found = [layer.pages["default"].slots for layer in layers]
    assert hot == sum(half.untyped_storage().nbytes() for one in found for half in (one.A_HrI, one.B_HrO))


def test_factors_stay_in_the_map(folders, tmp_path):
    """No way of using them on a CPU brings them into private memory."""
    model = ArrowLoraModel.from_pretrained(pico_base(), folders, top_k=2, expert_store=tmp_path)
    places = {name: p.data_ptr() for name, p in paged_parameters(model).items()}
    logits_of(model)
    model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
    model.to("cpu")
    model.set_scale(0.5)
    logits_of(model)
    assert {name: p.data_ptr() for name, p in paged_parameters(model).items()} == places
    del model
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_fresh_experts(tmp_path):
    torch.manual_seed(0)
    config = ArrowLoraConfig(
        num_experts=20, r=4, top_k=3, target_modules="all-linear", init_weights=False, inference_mode=True
    )
    model = get_peft_model(pico_base(), config).eval()
    before = logits_of(model)
    model.page_experts(tmp_path, hot_experts=4)
    assert_close(logits_of(model), before)
