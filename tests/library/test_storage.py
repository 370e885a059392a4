"""A library on disk: what is written, that it is checked when read, and that nothing is lost on the way."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file

from peft_arrow import AdapterLibrary, ArrowLoraModel
from peft_arrow.library import folders
from tests.pico import pico_adapter, pico_base


BASE = "me/pico"


@pytest.fixture
def library(adapter_folders):
    """Three experts: plurals, dates, sql."""
    return AdapterLibrary.from_pretrained(list(adapter_folders.values()), base_model=BASE)


def all_files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_written(library, tmp_path, adapter_folders):
    library.save_pretrained(tmp_path / "lib")
    assert sorted(all_files(tmp_path / "lib")) == sorted(
        ["README.md", "library.json"]
        + [
            f"experts/{name}/{file}"
            for name in library
            for file in ("adapter_config.json", "adapter_model.safetensors")
        ]
    )
    content = json.loads((tmp_path / "lib/library.json").read_text())
    assert content["format_version"] == 1
    assert content["base_model"] == {"name_or_path": BASE, "revision": None}
    weights = Path(adapter_folders["dates"], "adapter_model.safetensors").read_bytes()
    assert content["experts"][1] == {
        "name": "dates",
        "rank": 8,
        "alpha": 8.0,
        "target_modules": ["o_proj", "q_proj", "v_proj"],
        "size": len(weights),
        "sha256": hashlib.sha256(weights).hexdigest(),
        "origin": {"source": "dates", "commit": None, "license": None, "task": None, "datasets": []},
    }
    assert (tmp_path / "lib/experts/dates/adapter_model.safetensors").read_bytes() == weights
    config = json.loads((tmp_path / "lib/experts/dates/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE and config["r"] == 8
    assert ModelCard.load(tmp_path / "lib/README.md").data.base_model == BASE
    assert os.listdir(tmp_path) == ["lib"], "no draft is left"
    assert (tmp_path / "lib").stat().st_mode & 0o777 == 0o777 & ~folders._umask()


def test_equal_libraries_are_equal_files(library, tmp_path):
    library.save_pretrained(tmp_path / "one")
    AdapterLibrary.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert all_files(tmp_path / "one") == all_files(tmp_path / "two")


def test_origin_is_taken_from_cards(tmp_path, adapter_folders):
    folder = Path(pico_adapter(tmp_path / "a", seed=1, r=2, target_modules=["q_proj"]))
    (folder / "README.md").write_text("---\nlicense: mit\ndatasets:\n- me/data\n---\n# A\n")
    library = AdapterLibrary.from_pretrained([folder, adapter_folders["sql"]], base_model=BASE)
    library.save_pretrained(tmp_path / "lib")
    origin = AdapterLibrary.from_pretrained(tmp_path / "lib")["a"].origin
    assert (origin.source, origin.license, origin.datasets) == ("a", "mit", ("me/data",))
    (folder / "README.md").write_text("---\n- [broken\n---\n")
    assert AdapterLibrary.from_pretrained([folder], base_model=BASE)["a"].origin.license is None


def test_changed_weights_are_refused(library, tmp_path):
    library.save_pretrained(tmp_path / "lib")
    path = tmp_path / "lib/experts/dates/adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    message = r"dates'.*adapter_model.safetensors has the sha256 [0-9a-f]{64}, and library.json says"
    changed = AdapterLibrary.from_pretrained(tmp_path / "lib")
    assert len(changed["sql"].tensors) == 8
    with pytest.raises(ValueError, match=message):
        len(changed["dates"].tensors)
    with pytest.raises(ValueError, match=message):
        changed.save_pretrained(tmp_path / "copy")
    base = pico_base()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        ArrowLoraModel.from_pretrained(base, tmp_path / "lib")
    assert before.keys() == base.state_dict().keys() and os.listdir(tmp_path) == ["lib"]


def test_a_failed_save_changes_nothing(library, tmp_path, adapter_folders):
    library.save_pretrained(tmp_path / "lib")
    before = all_files(tmp_path)
    broken = Path(pico_adapter(tmp_path / "x" / "broken", seed=1, r=2, target_modules=["q_proj"]))
    bigger = library.add([broken])
    (broken / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="adapter_model.safetensors is damaged"):
        bigger.save_pretrained(tmp_path / "lib")
    (broken / "adapter_model.safetensors").unlink()
    (broken / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"there is only adapter_model.bin, a pickle"):
        bigger.save_pretrained(tmp_path / "lib")
    assert {name: data for name, data in all_files(tmp_path).items() if not name.startswith("x/")} == before
    assert sorted(os.listdir(tmp_path)) == ["lib", "x"]


def test_save_over_an_old_library(library, tmp_path):
    library.save_pretrained(tmp_path / "lib")
    (tmp_path / "lib/.gitattributes").write_text("mine")
    (tmp_path / "lib/README.md").write_text("# My own words")
    (tmp_path / "lib/notebooks").mkdir()
    (tmp_path / "lib/notebooks/a.ipynb").write_text("mine too")
    library.without("dates").save_pretrained(tmp_path / "lib")
    assert sorted(os.listdir(tmp_path / "lib/experts")) == ["plurals", "sql"]
    assert (tmp_path / "lib/.gitattributes").read_text() == "mine"
    assert (tmp_path / "lib/README.md").read_text() == "# My own words"
    assert (tmp_path / "lib/notebooks/a.ipynb").read_text() == "mine too"
    assert os.listdir(tmp_path) == ["lib"]


def test_save_into_its_own_folder_and_go_on(library, tmp_path):
    library.save_pretrained(tmp_path / "lib")
    own = AdapterLibrary.from_pretrained(tmp_path / "lib").rename({"sql": "queries"})
    own.save_pretrained(tmp_path / "lib")
    assert len(own["queries"].tensors) == 8
    own.save_pretrained(tmp_path / "copy")
    assert list(AdapterLibrary.from_pretrained(tmp_path / "copy")) == ["plurals", "dates", "queries"]


@pytest.mark.parametrize("occupied", ["file", "folder"])
def test_what_is_no_library_is_not_replaced(library, tmp_path, occupied):
    target = tmp_path / "mine"
    if occupied == "file":
        target.write_text("letter")
    else:
        target.mkdir()
        (target / "letter.txt").write_text("letter")
    before = all_files(tmp_path)
    with pytest.raises(ValueError, match=r"give a new"):
        library.save_pretrained(target)
    assert all_files(tmp_path) == before


def test_links_home_and_long_names(library, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    library.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real/library.json").is_file()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    library.save_pretrained("~/lib")
    assert list(AdapterLibrary.from_pretrained("~/lib")) == list(library)
    with pytest.raises(ValueError, match="288 bytes, and file systems take 255"):
        library.rename({"sql": "字" * 96}).save_pretrained(tmp_path / "lib")
    library.rename({"sql": "字" * 80}).save_pretrained(tmp_path / "lib")


def test_without_the_system_call(library, tmp_path, monkeypatch):
    """Where two folders cannot be swapped in one step, two steps end the same."""
    monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    library.save_pretrained(tmp_path / "lib")
    library.without("sql").save_pretrained(tmp_path / "lib")
    assert os.listdir(tmp_path) == ["lib"] and list(AdapterLibrary.from_pretrained(tmp_path / "lib")) == [
        "plurals",
        "dates",
    ]


def test_drafts_of_killed_runs_are_removed(library, tmp_path):
    abandoned = tmp_path / ".lib.draft-abc"
    (abandoned / "experts").mkdir(parents=True)
    (tmp_path / ".other.draft-abc").mkdir()
    with folders.new_folder(tmp_path / "lib") as running:
        library.save_pretrained(tmp_path / "lib")
        assert running.is_dir(), "another run's draft is left alone while it runs"
        running.joinpath("library.json").write_text("{}")
    assert sorted(os.listdir(tmp_path)) == [".other.draft-abc", "lib"]


def test_weights_are_the_same_bits(library, tmp_path):
    library.save_pretrained(tmp_path / "lib")
    for name, adapter in library.items():
        stored = load_file(tmp_path / f"lib/experts/{name}/adapter_model.safetensors")
        assert all(torch.equal(stored[key], tensor) for key, tensor in adapter.tensors.items())
    model = PeftModel.from_pretrained(pico_base(), str(tmp_path / "lib"), subfolder="experts/sql")
    assert model.peft_config["default"].r == 2


def test_format_1_loads_for_ever():
    """The golden library of format version 1: names, notes and every bit of the weights."""
    golden = Path(__file__).parent.parent / "golden" / "library-format-1"
    library = AdapterLibrary.from_pretrained(golden)
    assert list(library) == ["plurals", "dates"] and library.base_model_name_or_path == "me/pico"
    assert library["plurals"].origin.license == "apache-2.0" and library["dates"].origin.license is None
    assert library["plurals"].origin.datasets == ("me/plurals",)
    assert library.notes.description == "A golden library." and library.notes.evaluation[0].value == 0.5
    for name, rank in (("plurals", 1), ("dates", 2)):
        assert library[name].tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (
            rank,
            32,
        )
    assert ArrowLoraModel.from_pretrained(pico_base(), golden).expert_names == ["plurals", "dates"]
