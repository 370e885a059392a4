"""A.4: arguments are checked when they are given, references are what people write, nothing given is changed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import ArrowConfig

from peft_arrow import Adapter, AdapterRef, ArrowLoraConfig, ArrowLoraModel
from peft_arrow.library import reading

from .adapters import (
    TOLERANCE,
    VISIBLE,
    adapter,
    assert_unchanged,
    difference,
    edit_tensors,
    logits,
    plain,
    routed,
    snapshot,
)
from .bases import llama


def test_default_top_k_above_the_number_of_experts(trio):
    """PEFT's default of 3 fails with 2 experts; here more than there are means all of them."""
    folders = [trio["one"], trio["two"]]
    assert ArrowLoraConfig().top_k > 2
    assert torch.equal(logits(routed(folders)), logits(routed(folders, top_k=2)))


@pytest.mark.parametrize("top_k", [0, -1, 2.5, "2", True, None])
def test_top_k_is_checked(trio, top_k):
    with pytest.raises(ValueError, match=r"top_k=.* is not allowed; it must be a whole number of at least 1"):
        routed([trio["one"]], top_k=top_k)


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), "1", None])
def test_temperature_is_checked(trio, temperature):
    with pytest.raises(
        ValueError, match=r"router_temperature=.* is not allowed; it must be a positive, finite number"
    ):
        routed([trio["one"]], router_temperature=temperature)


@pytest.mark.parametrize("option", ["rng_seed", "use_gks", "general_adapter_paths", "foo"])
def test_unknown_arguments_are_refused(trio, option):
    """Also what only PEFT's Arrow knows: a seed is not needed, GenKnowSub is not there yet."""
    with pytest.raises(TypeError, match=rf"unknown argument '{option}'; allowed are .*top_k"):
        routed([trio["one"]], **{option: 1})
    with pytest.raises(TypeError, match=option):
        ArrowLoraConfig(**{option: 1})


@pytest.mark.parametrize("temperature", [1e-5, 1e-10, 1e-40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_low_temperature_is_the_argmax(trio, dtype, temperature):
    folders = list(trio.values())
    cold, single = routed(folders, router_temperature=temperature).to(dtype), routed(folders, top_k=1).to(dtype)
    found, expected = logits(cold), logits(single)
    assert torch.isfinite(found).all()
    assert difference(found, expected) <= (TOLERANCE if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("adapters", [[], (), {}, None], ids=repr)
def test_no_adapters(adapters):
    with pytest.raises(ValueError, match="adapters.*(empty|None)"):
        routed(adapters)


def test_accepted_forms_agree(trio, tmp_path, monkeypatch):
    """List, tuple, generator, Path, `~`, relative, AdapterRef, dict: the same model."""
    names, folders = list(trio), list(trio.values())
    root = Path(folders[0]).parent
    monkeypatch.setenv("HOME", str(root))
    monkeypatch.chdir(root)
    expected = logits(routed(folders))
    forms = [
        tuple(folders),
        (folder for folder in folders),
        [Path(folder) for folder in folders],
        [f"~/{name}" for name in names],
        [f"./{name}" for name in names],
        names,
        [AdapterRef(root, subfolder=name) for name in names],
        trio,
    ]
    for form in forms:
        model = routed(form)
        assert model.expert_names == names and torch.equal(logits(model), expected)


def test_experts_in_memory(trio):
    """Adapters that a PeftModel holds, under names of the user's choice."""
    holder = PeftModel.from_pretrained(llama(), trio["one"], adapter_name="first")
    holder.load_adapter(trio["two"], "second")
    in_memory = [Adapter.from_peft_model(holder, name) for name in ("first", "second")]
    model = routed(in_memory)
    assert model.expert_names == ["first", "second"]
    assert torch.equal(logits(model), logits(routed([trio["one"], trio["two"]])))
    assert routed({"x": in_memory[0], "y": trio["two"]}).expert_names == ["x", "y"]


def test_low_cpu_mem_usage(trio):
    config = ArrowLoraConfig(adapters=trio, task_type="CAUSAL_LM")
    model = get_peft_model(llama(), config, low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(model), logits(routed(trio)))


def test_string_instead_of_a_list(trio):
    with pytest.raises(ValueError, match=r"is a single adapter; pass a list of references, such as \['.*one'\]"):
        routed(trio["one"])


@pytest.mark.parametrize("form", [str, Path, AdapterRef])
def test_missing_path_is_called_so(trio, form):
    with pytest.raises(ValueError, match=r"the path '/does/not/exist' does not exist"):
        routed([trio["one"], form("/does/not/exist")])


def test_same_adapter_twice_is_told_apart_by_name(trio):
    """Taken, as a list may want it, but visible: the second has another name, in the trace too."""
    model = routed([trio["one"], trio["two"], trio["one"]], top_k=2)
    assert model.expert_names == ["one", "two", "one-2"]
    with pytest.raises(ValueError, match=r"expert_names holds 'one' more than once"):
        routed([trio["one"], trio["one"]], expert_names=["one", "one"])


def test_same_adapter_twice_is_logged(trio, caplog):
    routed([trio["one"], trio["two"]], top_k=2)
    assert "same adapter" not in caplog.text
    routed({"a": trio["one"], "b": trio["two"], "c": Path(trio["one"])}, top_k=2)
    assert "Experts 'a' and 'c' are the same adapter" in caplog.text


def test_each_reference_has_its_own_place_on_the_hub(trio, monkeypatch):
    """Revision, token and subfolder belong to a reference, not to the call."""
    asked = []

    def download(repo_id, filename, **options):
        asked.append((repo_id, options["subfolder"], options["revision"], options["token"]))
        if repo_id not in ("me/one", "me/two"):
            raise EntryNotFoundError(f"no {repo_id}")
        return str(Path(trio[repo_id.removeprefix("me/")]) / filename)

    monkeypatch.setattr(reading, "hf_hub_download", download)
    references = ["me/one@v1", AdapterRef("me/two/sub", revision="v2", token="secret")]
    model = routed(references, revision="v9", token="mine")
    assert model.expert_names == ["one", "sub"]
    assert set(asked) == {("me/one", None, "v1", "mine"), ("me/two", "sub", "v2", "secret")}
    assert torch.equal(logits(model), logits(routed([trio["one"], trio["two"]])))


def test_config_is_neither_changed_nor_shared(trio):
    config = ArrowLoraConfig(adapters=[trio["one"], trio["two"]], top_k=1, task_type="CAUSAL_LM")
    before = copy.deepcopy(vars(config))
    first = get_peft_model(llama(), config)
    expected = logits(first)
    first.add_expert(trio["three"])
    first.set_router("uniform", top_k=3)
    second = get_peft_model(llama(), config)
    assert torch.equal(logits(second), expected)
    assert first.expert_names == ["one", "two", "three"] and second.expert_names == ["one", "two"]
    # PEFT's own get_peft_model writes the base's name and the model class into every method's config
    written_by_peft = ("base_model_name_or_path", "auto_mapping")
    assert {k: v for k, v in vars(config).items() if k not in written_by_peft} == {
        k: v for k, v in before.items() if k not in written_by_peft
    }


@pytest.mark.parametrize("position", [1, 2])
def test_failure_leaves_the_base_and_a_retry_works(tmp_path, trio, position):
    bad = adapter(tmp_path / "bad")
    edit_tensors(bad, lambda tensors: tensors[next(iter(tensors))].fill_(float("nan")))
    folders = list(trio.values())
    folders.insert(position, bad)
    base = llama()
    before = snapshot(base)
    with pytest.raises(ValueError, match="'bad'.*NaN"):
        ArrowLoraModel.from_pretrained(base, folders)
    assert_unchanged(base, before)
    with pytest.raises(ValueError, match="'bad'.*NaN"):
        get_peft_model(base, ArrowLoraConfig(adapters=folders, task_type="CAUSAL_LM"))
    assert_unchanged(base, before)
    again = ArrowLoraModel.from_pretrained(base, list(trio.values()))
    assert torch.equal(logits(again), logits(routed(list(trio.values()))))


def test_routing_twice_says_what_to_do(trio):
    base = llama()
    model = ArrowLoraModel.from_pretrained(base, [trio["one"]])
    before = logits(model)
    for again in (model, base):
        with pytest.raises(ValueError, match=r"(unload|delete_adapter)"):
            ArrowLoraModel.from_pretrained(again, [trio["two"]])
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(ArrowLoraModel.from_pretrained(model.unload(), [trio["one"]])), before)


def test_config_without_experts():
    """PEFT's `LoraConfig(arrow_config=...)` dies on None; a config of ours without experts says what it lacks."""
    base = llama()
    before = snapshot(base)
    with pytest.raises(ValueError, match="adapters.*num_experts"):
        get_peft_model(base, ArrowLoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert_unchanged(base, before)


def test_router_of_peft_is_not_an_expert(tmp_path, trio):
    """A config that carries PEFT's `arrow_config` is refused by name, not taken for a dead LoRA."""
    holder = PeftModel.from_pretrained(llama(), trio["one"])
    taken = Adapter.from_peft_model(holder)
    config = LoraConfig(arrow_config=ArrowConfig(), target_modules=["q_proj"]).to_dict()
    with pytest.raises(ValueError, match="arrow_config.*pass the folder that holds task_0"):
        routed([Adapter("router", {**taken.config, "arrow_config": config["arrow_config"]}, taken.tensors)])


def test_one_expert_by_every_route(trio):
    """top_k=1 of one expert, and top_k=3 of one expert, are the plain adapter."""
    expected = logits(plain(trio["one"]))
    assert difference(expected, logits(llama())) > VISIBLE
    for top_k in (1, 3):
        assert difference(logits(routed([trio["one"]], top_k=top_k)), expected) <= TOLERANCE
