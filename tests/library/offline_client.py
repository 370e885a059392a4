"""Without the Hub, with a cache that `pull_client` filled; `test_hub_roundtrip` runs this as a process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from peft_arrow import AdapterLibrary, ArrowLoraModel
from tests.library.hub_runs import logits_of, run_checks
from tests.pico import pico_base


def check_routed_model(work: Path, commit: str):
    """The same model as with the Hub."""
    assert constants.HF_HUB_OFFLINE
    model = ArrowLoraModel.from_pretrained(pico_base(), "alice/lib")
    assert torch.equal(logits_of(model), torch.load(work / "pulled.pt"))


def check_library(work: Path, commit: str):
    """The library that the cache holds, of the same commit; its headers and weights too."""
    for reference in ("alice/lib", "alice/lib@v1", f"alice/lib@{commit}"):
        library = AdapterLibrary.from_pretrained(reference)
        assert {adapter.tensors.place.commit for adapter in library.values()} == {commit}
    assert len(library["sql"].tensors) == len(library["sql"].tensors.header()) == 8
    library.save_pretrained(work / "offline")
    assert list(AdapterLibrary.from_pretrained(work / "offline")) == list(library)


def check_adapters(work: Path):
    """Single adapters, one of them in a folder of a repository."""
    library = AdapterLibrary.from_pretrained(["bob/single@v1", "alice/lib/experts/sql"])
    assert len(library["single"].tensors) == 4 and library["single"].origin.license == "mit"


def check_what_is_not_there(work: Path):
    """The error names the reference and says that the cache was looked at."""
    for reference in ("alice/unknown", "alice/lib@v7"):
        with pytest.raises(ValueError, match=rf"'{reference}'.*no such folder") as raised:
            AdapterLibrary.from_pretrained([reference])
        assert "cache" in str(raised.value)


if __name__ == "__main__":
    run_checks(globals(), Path(sys.argv[1]), sys.argv[2])
