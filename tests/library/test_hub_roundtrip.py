"""A library goes to the Hub and comes back in another process, for this package and for plain PEFT."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from peft_arrow import AdapterLibrary, ArrowLoraModel
from tests.hub_server import ROOT, serve
from tests.library.hub_runs import BASE, SHAPES, add_base, finish, logits_of, make_adapters, run_client
from tests.pico import pico_base


# Plain PEFT in a process where peft_arrow cannot be imported.
PLAIN = """
import sys, torch
sys.modules["peft_arrow"] = None
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, repo, out, *names = sys.argv[1:]
tokens, logits = torch.arange(12).reshape(2, 6) + 5, {}
for name in names:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), repo, subfolder=f"experts/{name}")
    with torch.no_grad():
        logits[name] = model(tokens).logits
torch.save(logits, out)
"""


def start_plain(hub, home: Path, *arguments: object) -> subprocess.Popen:
    """Start `PLAIN` with a cache of its own."""
    command = [sys.executable, "-c", PLAIN, *map(str, arguments)]
    environment = hub.environment(home, OMP_NUM_THREADS="1")
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_round_trip(tmp_path):
    """Push, pull in a new process and cache, and once more without the Hub: the same bits everywhere."""
    folders = make_adapters(tmp_path / "adapters")
    local = AdapterLibrary.from_pretrained(list(folders.values()))
    assert local.base_model_name_or_path == BASE
    local.save_pretrained(tmp_path / "library")
    expected = logits_of(ArrowLoraModel.from_pretrained(pico_base(), local))
    routed = logits_of(ArrowLoraModel.from_pretrained(pico_base(), local, top_k=2))
    plain = {
        name: logits_of(PeftModel.from_pretrained(pico_base(), str(folder), name)) for name, folder in folders.items()
    }
    with serve(orgs={"lab": ["alice"], "guild": ["bob"]}) as hub:
        add_base(hub, tmp_path / "base")
        assert len(run_client("push_client", hub.endpoint, tmp_path / "home1", tmp_path)) == 12
        peft = start_plain(hub, tmp_path / "home3", BASE, "alice/lib", tmp_path / "plain.pt", *SHAPES)
        assert len(run_client("pull_client", hub.endpoint, tmp_path / "home2", tmp_path)) == 8
        finish(peft)
        assert hub.errors == []
        commit = hub.store.repo("model", "alice/lib").at("main").oid
    assert torch.equal(torch.load(tmp_path / "pulled.pt"), expected)
    assert torch.equal(torch.load(tmp_path / "routed.pt"), routed)
    alone = torch.load(tmp_path / "plain.pt")
    assert all(torch.equal(alone[name], plain[name]) for name in SHAPES)
    arguments = (hub.endpoint, tmp_path / "home2", tmp_path, commit)
    assert len(run_client("offline_client", *arguments, HF_HUB_OFFLINE="1")) == 4
