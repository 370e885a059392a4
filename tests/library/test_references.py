"""What a reference means: local forms, names, what is refused; the Hub, with the real client against loopback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora.arrow import create_arrow_model
from peft.tuners.lora.config import ArrowConfig

from peft_arrow import Adapter, AdapterRef, ArrowLoraConfig, ArrowLoraModel
from peft_arrow.library.adapter import list_locations
from peft_arrow.library.names import slug
from tests.hub_server import TOKEN, serve
from tests.pico import pico_adapter, pico_base


ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path) -> Path:
    """One adapter."""
    return Path(pico_adapter(tmp_path / "shelf" / "my adapter!", seed=1, r=2, target_modules=["q_proj"]))


def test_local_forms(folder, monkeypatch):
    """Path, absolute, relative, ~ and a bare folder name all mean the folder."""
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent.parent))
    forms = [folder, str(folder), f"./{folder.name}", folder.name, f"~/shelf/{folder.name}", f"../shelf/{folder.name}"]
    for form in [*forms, AdapterRef(folder), AdapterRef(str(folder.parent), subfolder=folder.name)]:
        located = list_locations([form])
        assert list(located) == ["my-adapter"], form
        assert located["my-adapter"].folder.resolve() == folder.resolve()


@pytest.mark.parametrize(
    "reference, message",
    [
        ("/does/not/exist", "the path '/does/not/exist' does not exist"),
        (Path("does/not/exist"), "the path 'does/not/exist' does not exist"),
        ("~/nowhere", "does not exist"),
        ("./nowhere", "does not exist"),
        ("nowhere", "there is no such folder, and a Hub id has the form"),
        ("user/repo", "there is no such folder, and the Hub"),
    ],
)
def test_missing_places(reference, message):
    """A path is never taken for a Hub id, and where both were tried the error says so."""
    with pytest.raises(ValueError, match=message):
        list_locations([reference])


def test_a_folder_without_an_adapter(tmp_path):
    """The file that is missing is named."""
    with pytest.raises(ValueError, match=r"holds no adapter_config\.json"):
        list_locations([tmp_path])


def test_names(folder):
    """A dict gives names, a list derives them, duplicates are numbered, bad given names are refused."""
    assert list(list_locations({"a.b-c_1": folder, "übung": folder})) == ["a.b-c_1", "übung"]
    assert list(list_locations([folder, folder, folder])) == ["my-adapter", "my-adapter-2", "my-adapter-3"]
    for name in ("", ".hidden", "a/b", "a b", "x" * 97, "line\nbreak"):
        with pytest.raises(ValueError, match="is not allowed; a name is 1 to 96 characters"):
            list_locations({name: folder})
    assert slug("weird name/with*stuff") == "weird-name-with-stuff" and slug("...") == "adapter"
    assert len(slug("x" * 300)) == 96


def test_what_is_no_list(folder):
    """Nothing, a string, a number."""
    for empty in ([], {}, ()):
        with pytest.raises(ValueError, match="adapters is empty"):
            list_locations(empty)
    with pytest.raises(ValueError, match="is a single adapter; pass a list of references"):
        list_locations(str(folder))
    with pytest.raises(TypeError, match="pass a list of references or a dict"):
        list_locations(7)
    with pytest.raises(TypeError, match="holds 7 of type int"):
        list_locations([7])
    with pytest.raises(ValueError, match="adapters=None is not allowed"):
        ArrowLoraModel.from_pretrained(pico_base(), None)


def test_in_memory(folder):
    """An adapter out of a PeftModel, under its own name or a given one, equals the one read from the folder."""
    plain = PeftModel.from_pretrained(pico_base(), folder, adapter_name="mine")
    adapter = Adapter.from_peft_model(plain, "mine")
    ids = torch.arange(8)[None] + 5
    with torch.no_grad():
        expected = plain(ids).logits
        model = ArrowLoraModel.from_pretrained(pico_base(), [adapter], top_k=1)
        assert model.expert_names == ["mine"]
        assert float((model(ids).logits - expected).abs().max()) < 1e-5
        model = get_peft_model(pico_base(), ArrowLoraConfig(adapters={"x": adapter})).eval()
        assert model.expert_names == ["x"]
        assert float((model(ids).logits - expected).abs().max()) < 1e-5


def test_folder_of_pefts_arrow(tmp_path):
    """A folder written by create_arrow_model is its tasks, by number; its router is not an expert."""
    folders = [pico_adapter(tmp_path / f"a{i}", seed=i, r=2, target_modules=["q_proj"]) for i in range(11)]
    model = create_arrow_model(pico_base(), folders, ArrowConfig(top_k=2, rng_seed=0))
    model.save_pretrained(tmp_path / "arrow")
    routed = ArrowLoraModel.from_pretrained(pico_base(), str(tmp_path / "arrow"), top_k=2)
    assert routed.expert_names == [f"task_{i}" for i in range(11)]
    with pytest.raises(ValueError, match="arrow_config=.* is not supported: it is a router of PEFT's Arrow"):
        ArrowLoraModel.from_pretrained(pico_base(), [tmp_path / "arrow" / "arrow_router"])


def test_task_types(tmp_path):
    """Taken from the adapters; different ones want a choice."""
    one = pico_adapter(tmp_path / "one", seed=1, r=2, target_modules=["q_proj"])
    two = shutil.copytree(one, tmp_path / "two")
    config = json.loads((two / "adapter_config.json").read_text())
    (two / "adapter_config.json").write_text(json.dumps({**config, "task_type": "FEATURE_EXTRACTION"}))
    assert ArrowLoraConfig(adapters=[one]).task_type == "CAUSAL_LM"
    with pytest.raises(ValueError, match="different task types"):
        ArrowLoraConfig(adapters=[one, two])
    assert ArrowLoraConfig(adapters=[one, two], task_type="CAUSAL_LM").task_type == "CAUSAL_LM"


HUB_SCRIPT = """
import sys, json
from peft_arrow import AdapterRef, ArrowLoraModel
from tests.pico import pico_base
token = sys.argv[1]
for bad in (["ann/private-one"], ["ann/nothing"], ["ann/plain@v9"], ["ann/plain/sub"], ["ann/pickled"]):
    try:
        ArrowLoraModel.from_pretrained(pico_base(), bad)
    except ValueError as error:
        print(json.dumps([bad[0], str(error)]))
model = ArrowLoraModel.from_pretrained(
    pico_base(),
    ["ann/plain", "ann/shelf/experts/b", "ann/plain@v2", AdapterRef("ann/private-one", token=token), "bob/arrow"],
    top_k=2,
)
layer = model.base_model.routed_layers()["model.layers.0.self_attn.q_proj"]
print(json.dumps([model.expert_names, layer.experts["default"].ranks]))
"""


def test_hub(tmp_path):
    """Repository, subfolder, revision, private with its own token, PEFT's Arrow; errors of what is not there."""
    hub = tmp_path / "hub"
    options = {"target_modules": ["q_proj"]}
    pico_adapter(hub / "ann/plain/main", seed=1, r=2, **options)
    pico_adapter(hub / "ann/plain/v2", seed=2, r=3, **options)
    pico_adapter(hub / "ann/shelf/main/experts/b", seed=3, r=4, **options)
    pico_adapter(hub / "ann/private-one/main", seed=4, r=5, **options)
    pico_adapter(hub / "ann/pickled/main", seed=4, r=5, **options)
    (hub / "ann/pickled/main/adapter_model.safetensors").rename(hub / "ann/pickled/main/adapter_model.bin")
    for name, rank in (("task_0", 6), ("task_1", 7), ("arrow_router", 7)):
        pico_adapter(hub / "bob/arrow/main" / name, seed=rank, r=rank, **options)
    with serve(hub) as server:
        environment = server.environment(tmp_path / "home", token=None)
        done = subprocess.run(
            [sys.executable, "-c", HUB_SCRIPT, TOKEN], cwd=ROOT, env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert lines.pop() == [["plain", "b", "plain-2", "private-one", "task_0", "task_1"], [2, 4, 3, 5, 6, 7]]
    errors = dict(lines)
    assert len(errors) == 5
    for name in ("ann/private-one", "ann/nothing", "ann/plain@v9"):
        assert "there is no such folder, and the Hub answered" in errors[name]
    assert "holds no sub/adapter_config.json" in errors["ann/plain/sub"]
    assert "only adapter_model.bin, a pickle" in errors["ann/pickled"]
