"""AdapterLibrary: an ordered mapping that never changes, of one base model, with weights read when asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from peft_arrow import Adapter, AdapterLibrary, ArrowLoraModel
from peft_arrow.library.manifest import Evaluation
from tests.pico import pico_adapter, pico_base


BASE = "me/pico"


@pytest.fixture
def library(adapter_folders):
    """Three experts: plurals, dates, sql."""
    return AdapterLibrary.from_pretrained(list(adapter_folders.values()), base_model=BASE)


def set_base(folder: str | Path, name: str | None, **more) -> str:
    """Change what an adapter's config says of its base."""
    path = Path(folder) / "adapter_config.json"
    config = {**json.loads(path.read_text()), "base_model_name_or_path": name, **more}
    path.write_text(json.dumps(config))
    return str(folder)


def adapter_of(folder: Path, base: str | None, seed: int = 1, **config) -> str:
    return set_base(pico_adapter(folder, seed=seed, r=4, target_modules=["q_proj"]), base, **config)


def test_ordered_mapping(library, adapter_folders):
    assert list(library) == ["plurals", "dates", "sql"] and len(library) == 3 and "sql" in library
    adapter = library["dates"]
    assert isinstance(adapter, Adapter) and adapter.name == "dates" and adapter.config["r"] == 8
    stored = load_file(adapter_folders["dates"] + "/adapter_model.safetensors")
    assert adapter.tensors.keys() == stored.keys()
    assert all(torch.equal(adapter.tensors[key], tensor) for key, tensor in stored.items())
    with pytest.raises(KeyError):
        library["nothing"]
    with pytest.raises(KeyError):
        adapter.tensors["nothing"]


def test_operations_give_new_libraries(library, adapter_folders):
    assert list(library.select(["sql", "plurals"])) == ["sql", "plurals"]
    assert list(library.select("sql")) == ["sql"]
    assert list(library.without(["dates"])) == ["plurals", "sql"]
    renamed = library.rename({"dates": "days"})
    assert list(renamed) == ["plurals", "days", "sql"] and renamed["days"].name == "days"
    added = library.add([adapter_folders["sql"], adapter_folders["dates"]])
    assert list(added) == ["plurals", "dates", "sql", "sql-2", "dates-2"]
    assert list(library.add({"more": adapter_folders["sql"]}))[-1] == "more"
    assert list(library.add(adapter_folders["sql"]))[-1] == "sql-2"
    assert list(library.add([library]))[3:] == ["plurals-2", "dates-2", "sql-2"]
    assert list(library) == ["plurals", "dates", "sql"]


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda library: library.select(["sql", "nothing"]), r"names holds 'nothing'.*it holds \['plurals'"),
        (lambda library: library.select(["sql", "sql"]), "holds a name twice"),
        (lambda library: library.select([]), "at least one"),
        (lambda library: library.without(["nothing"]), "names holds 'nothing'"),
        (lambda library: library.without(list(library)), "at least one"),
        (lambda library: library.rename({"nothing": "x"}), "names holds 'nothing'"),
        (lambda library: library.rename({"sql": "dates"}), "makes a name double"),
        (lambda library: library.rename({"sql": "../x"}), "is not allowed; a name is"),
        (lambda library: library.add({"sql": next(iter(library.values()))}), "'sql' is already in the library"),
        (lambda library: library.describe(pictures={"nothing.png": "x"}), "'nothing.png', which is no file"),
    ],
)
def test_wrong_operations(library, operation, message):
    with pytest.raises(ValueError, match=message):
        operation(library)


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    folder = adapter_of(tmp_path / "a", BASE)
    library = AdapterLibrary.from_pretrained([folder])
    (tmp_path / "a/adapter_model.safetensors").unlink()
    assert library["a"].config["r"] == 4
    with pytest.raises(ValueError, match=r"adapter_model.safetensors cannot be read"):
        library["a"].tensors.items()


def test_experts_in_memory():
    model = get_peft_model(pico_base(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapters = [Adapter.from_peft_model(model, name="one"), Adapter.from_peft_model(model, name="one")]
    library = AdapterLibrary(adapters, base_model=BASE)
    assert list(library) == ["one", "one-2"]
    assert list(AdapterLibrary({"x": adapters[0]}, base_model=BASE)) == ["x"]
    with pytest.raises(ValueError, match="adapters is empty"):
        AdapterLibrary([], base_model=BASE)


def test_base_model_is_checked(tmp_path):
    same = [
        adapter_of(tmp_path / "a", "/data/models--org--Base-1B/snapshots/" + "0" * 40),
        adapter_of(tmp_path / "b", "org/Base-1B"),
        adapter_of(tmp_path / "c", None),
        adapter_of(tmp_path / "d", "unsloth/base-1b-bnb-4bit"),
    ]
    library = AdapterLibrary.from_pretrained(same)
    assert library.base_model_name_or_path == "org/Base-1B"
    other = adapter_of(tmp_path / "e", "org/Another-1B")
    with pytest.raises(ValueError, match=r"'e'.*'org/Another-1B'.*one base model"):
        AdapterLibrary.from_pretrained([*same, other])
    with pytest.raises(ValueError, match=r"'e'.*'org/Another-1B', the library for 'org/Base-1B'"):
        library.add([other])
    assert AdapterLibrary.from_pretrained([*same, other], base_model="org/Base-1B-v2").base_model_name_or_path == (
        "org/Base-1B-v2"
    )
    with pytest.raises(ValueError, match="no adapter names its base model; pass base_model"):
        AdapterLibrary.from_pretrained([same[2]])


def test_what_is_no_lora_is_refused(tmp_path):
    folder = adapter_of(tmp_path / "a", BASE, use_dora=True)
    with pytest.raises(ValueError, match="use_dora=True is not supported"):
        AdapterLibrary.from_pretrained([folder])


def test_a_library_folder_is_a_reference(library, tmp_path, adapter_folders):
    library.save_pretrained(tmp_path / "lib")
    again = AdapterLibrary.from_pretrained(tmp_path / "lib")
    assert list(again) == list(library) and again.base_model_name_or_path == BASE
    mixed = AdapterLibrary.from_pretrained([adapter_folders["sql"], tmp_path / "lib"], base_model=BASE)
    assert list(mixed) == ["sql", "plurals", "dates", "sql-2"]
    assert list(AdapterLibrary.from_pretrained([again, again], base_model=BASE))[3:] == [
        f"{name}-2" for name in library
    ]
    with pytest.raises(ValueError, match=r"adapters\['x'\].*is a library of 3 adapters"):
        AdapterLibrary.from_pretrained({"x": tmp_path / "lib"})


def test_a_library_of_one(library, tmp_path):
    library.select("sql").save_pretrained(tmp_path / "lib")
    assert list(AdapterLibrary.from_pretrained(tmp_path / "lib")) == ["sql"]
    assert ArrowLoraModel.from_pretrained(pico_base(), tmp_path / "lib").expert_names == ["sql"]
    with pytest.raises(ValueError, match="is a library of 1 adapters"):
        AdapterLibrary.from_pretrained({"x": tmp_path / "lib"})


def test_routed_models_take_libraries(library, tmp_path, adapter_folders):
    """A library in memory, its folder, and the adapters one by one route alike."""
    ids = torch.arange(12).reshape(2, 6) + 5
    library.save_pretrained(tmp_path / "lib")
    logits = []
    for adapters in (list(adapter_folders.values()), library, tmp_path / "lib", str(tmp_path / "lib"), [library]):
        model = ArrowLoraModel.from_pretrained(pico_base(), adapters, top_k=2)
        assert model.expert_names == ["plurals", "dates", "sql"]
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert all(torch.equal(logits[0], other) for other in logits[1:])
    names = ArrowLoraModel.from_pretrained(pico_base(), library.rename({"sql": "queries"})).expert_names
    assert names == ["plurals", "dates", "queries"]


def test_notes_travel(library, tmp_path):
    (tmp_path / "map.png").write_bytes(b"\x89PNG")
    told = library.describe(
        "Three experts.",
        made={"command": "peft-arrow build", "seeds": [0]},
        evaluation=[Evaluation("plurals", "exact_match", 0.5)],
        pictures={tmp_path / "map.png": "A map."},
    )
    told.save_pretrained(tmp_path / "lib")
    assert (tmp_path / "lib/pictures/map.png").read_bytes() == b"\x89PNG"
    shutil.move(tmp_path / "lib", tmp_path / "moved")
    again = AdapterLibrary.from_pretrained([tmp_path / "moved"])
    assert again.notes == told.notes
    again.save_pretrained(tmp_path / "third")
    assert (tmp_path / "third/pictures/map.png").read_bytes() == b"\x89PNG"
    smaller = again.without("sql")
    assert smaller.notes.description == "Three experts." and not smaller.notes.evaluation + smaller.notes.pictures


def test_a_folder_of_adapters_is_not_guessed_at(adapter_folders):
    parent = Path(adapter_folders["sql"]).parent
    with pytest.raises(
        ValueError, match=r"holds no adapter_config.json.*Its subfolders are adapters.*dates, plurals, sql"
    ):
        AdapterLibrary.from_pretrained(parent)
