"""`peft-arrow inspect`: what a newcomer reads of a mixed folder, JSON, exit codes; the Hub by headers alone."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_arrow.cli import main
from tests.hub_server import serve
from tests.pico import pico_adapter, pico_base


ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/inspect.txt"
CARD = "---\nlicense: {}\n---\n# An adapter\n"


def adapter(folder: Path, seed: int, license: str | None = "apache-2.0", weights=None, r: int = 4, **config) -> Path:
    """A pico adapter with a card, its weights and its config changed."""
    pico_adapter(folder, seed=seed, r=r, target_modules=["q_proj", "v_proj"])
    path = folder / "adapter_config.json"
    content = {**json.loads(path.read_text()), "base_model_name_or_path": "ann/base", **config}
    path.write_text(json.dumps(content))
    (folder / "README.md").write_text(CARD.format(license) if license else "# An adapter\n")
    if weights is not None:
        path = folder / "adapter_model.safetensors"
        save_file({key: weights(key, tensor) for key, tensor in load_file(path).items()}, path, {"format": "pt"})
    return folder


def not_finite(key: str, tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, math.nan) if key.endswith("1.self_attn.v_proj.lora_B.weight") else tensor


@pytest.fixture
def mixed(tmp_path, monkeypatch) -> Path:
    """A folder as people have them: good adapters, and one bad in each way; the working folder is above it."""
    monkeypatch.chdir(tmp_path)
    pico_base().save_pretrained("base")
    shelf = Path("shelf")
    adapter(shelf / "dates", 1)
    adapter(shelf / "plurals", 2, r=8)
    adapter(shelf / "plurals-half", 2, r=8, weights=lambda key, tensor: tensor.bfloat16())
    adapter(shelf / "sql", 3, license=None)
    adapter(shelf / "currencies", 4, license="license", base_model_name_or_path="unsloth/base-bnb-4bit")
    adapter(shelf / "rhymes", 5, license="cc-by-nc-4.0", base_model_name_or_path="bob/other-model", r=32)
    adapter(shelf / "dora", 6, use_dora=True)
    adapter(shelf / "for-llama", 7, weights=lambda key, tensor: wide(key, tensor), base_model_name_or_path="m/llama")
    adapter(shelf / "untrained", 8, weights=lambda key, tensor: tensor * ("lora_A" in key))
    adapter(shelf / "exploded", 9, weights=not_finite)
    adapter(shelf / "wrong-rank", 10, r=4)
    config = json.loads((shelf / "wrong-rank/adapter_config.json").read_text())
    (shelf / "wrong-rank/adapter_config.json").write_text(json.dumps({**config, "r": 16}))
    (adapter(shelf / "pickled", 11) / "adapter_model.safetensors").rename(shelf / "pickled/adapter_model.bin")
    (adapter(shelf / "no-config", 12) / "adapter_config.json").unlink()
    adapter(shelf / "evil\u202egnp", 13, base_model_name_or_path="\x1b[31mann\n/base")
    (shelf / "notes").mkdir()
    return shelf


def wide(key: str, tensor: torch.Tensor) -> torch.Tensor:
    return torch.ones(4, 64) if "q_proj.lora_A" in key else tensor


def test_a_mixed_folder(mixed, capsys):
    """The whole text; after a wanted change write it to the golden file and read it as a newcomer would."""
    assert main(["inspect", "shelf", "--base", "base"]) == 0
    printed = capsys.readouterr().out
    if os.environ.get("WRITE_GOLDEN"):
        GOLDEN.write_text(printed)
    assert printed == GOLDEN.read_text()


def test_json_and_exit_codes(mixed, capsys):
    """0 when the adapters were looked at, also the bad ones; 2 for bad arguments; stdout is JSON alone."""
    command = ["inspect", "shelf/dates", "shelf/dora", "nobody/nothing", "--base", "base", "--json"]
    assert main([*command, "--licenses", "mit"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [entry["ok"] for entry in content["adapters"]] == [False, False, False]
    assert main([*command, "--no-weights"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [entry["ok"] for entry in content["adapters"]] == [True, False, False]
    assert not any(entry["weights_read"] for entry in content["adapters"])
    for wrong in ([], ["shelf", "--licenses"], ["shelf", "--color"]):
        with pytest.raises(SystemExit) as stopped:
            main(["inspect", *wrong])
        assert stopped.value.code == 2
    capsys.readouterr()


def test_the_default_base(mixed, capsys):
    """What the adapters name; where that cannot be read the text says so, and names alone are compared."""
    assert main(["inspect", "shelf/dates", "shelf/rhymes"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Base model: ann/base." in printed
    assert "The shapes of ann/base could not be had" in printed and "names the base bob/other-model" in printed
    (mixed / "dates/adapter_config.json").write_text(
        (mixed / "dates/adapter_config.json").read_text().replace("ann/", "./")
    )
    assert main(["inspect", "shelf/dates"]) == 0
    assert "1 adapter: 1 ok." in capsys.readouterr().out


def upload(hub, repo_id: str, folder: Path, **settings) -> str:
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return hub.create(repo_id, files, **settings)


def inspect_hub(hub, home: Path, *arguments: str, token: str | None = "hf_alice") -> dict:
    command = "import sys; from peft_arrow.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", command, "inspect", *arguments, "--json"],
        env=hub.environment(home, token),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    content = json.loads(done.stdout)
    return content | {"by_name": {entry["name"]: entry for entry in content["adapters"]}}


@pytest.mark.slow
def test_the_hub(mixed, tmp_path):
    """Config, card and header are all that is read; private, missing and broken repositories are reported."""
    with serve() as hub:
        commit = upload(hub, "ann/dates", mixed / "dates")
        upload(hub, "ann/mine", mixed / "plurals", private=True, readers=["alice"])
        upload(hub, "ann/pickled", mixed / "pickled")
        upload(hub, "ann/zero", mixed / "untrained")
        shutil.copytree(mixed / "sql", tmp_path / "nested/experts/sql")
        upload(hub, "ann/nested", tmp_path / "nested")
        weights = (mixed / "dates/adapter_model.safetensors").read_bytes()
        upload(hub, "ann/cut", mixed / "dates")
        hub.commit("ann/cut", {"adapter_model.safetensors": weights[:200]})
        upload(hub, "ann/large", adapter(tmp_path / "large", 1, r=900))
        upload(hub, "ann/base", tmp_path / "base")
        names = ["dates", "mine", "pickled", "zero", "nested/experts/sql", "cut", "nothing", "dates@v9", "large"]
        content = inspect_hub(hub, tmp_path / "home", *(f"ann/{name}" for name in names), token=None)
        found = content["by_name"]
        assert content["base"] == "ann/base"
        assert {name: [problem["code"] for problem in entry["problems"]] for name, entry in found.items()} == {
            "dates": [],
            "mine": ["not_found"],
            "pickled": ["pickle_only"],
            "zero": [],
            "sql": [],
            "cut": ["unreadable_weights"],
            "nothing": ["not_found"],
            "dates-2": ["not_found"],
            "large": [],
        }
        assert found["dates"]["commit"] == commit and found["dates"]["license"] == "apache-2.0"
        assert found["dates"]["rank"] == 4 and not found["dates"]["warnings"] and not found["dates"]["weights_read"]
        tensors = load_file(mixed / "dates/adapter_model.safetensors").values()
        assert found["dates"]["size"] == sum(tensor.nbytes for tensor in tensors)
        assert "only config and header were read" in content["remarks"][0]
        assert not any("ann/base/resolve" in line and "model.safetensors" in line for line in hub.requests)
        assert not list((tmp_path / "home").rglob("*.safetensors"))
        large = [exchange for exchange in hub.log if "ann/large/resolve/" in exchange.path]
        size = (tmp_path / "large/adapter_model.safetensors").stat().st_size
        assert size > 500_000 and 0 < sum(exchange.sent for exchange in large) < 110_000

        read = inspect_hub(hub, tmp_path / "two", "ann/mine", "ann/zero", "--weights")["by_name"]
        assert read["mine"]["ok"] and read["mine"]["weights_read"]
        assert [problem["code"] for problem in read["zero"]["problems"]] == ["zero_update"]


def test_a_hub_that_breaks_off(mixed, tmp_path):
    """A connection that is closed between config and header is a finding of that adapter alone."""
    with serve() as hub:
        upload(hub, "ann/dates", mixed / "dates")
        upload(hub, "ann/plurals", mixed / "plurals")
        upload(hub, "ann/base", tmp_path / "base")
        hub.drop("*/ann/plurals/*safetensors", times=None)
        found = inspect_hub(hub, tmp_path / "home", "ann/dates", "ann/plurals")["by_name"]
    assert found["dates"]["ok"] and [p["code"] for p in found["plurals"]["problems"]] == ["unreadable_weights"]
