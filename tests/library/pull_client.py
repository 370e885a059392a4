"""What a user gets from the Hub in a new process with an empty cache; `test_hub_roundtrip` runs this as a process."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import LlamaForCausalLM

from peft_arrow import AdapterLibrary, AdapterRef, ArrowLoraModel
from peft_arrow.library.manifest import Manifest
from tests.library.hub_runs import BASE, TOKENS, Hub, files_of, logits_of, make_adapter, run_checks
from tests.pico import pico_base


API = HfApi()
WEIGHTS = "adapter_model.safetensors"


def check_routed_model(hub: Hub, work: Path):
    """The model of the library on the Hub, for comparison with that of the local library."""
    model = ArrowLoraModel.from_pretrained(pico_base(), "alice/lib")
    torch.save(logits_of(model), work / "pulled.pt")
    assert model.expert_names == ["plurals", "dates", "sql"]


def check_pushed_routed_model(hub: Hub, work: Path):
    """A routed model on the Hub is a PEFT model like others."""
    model = peft.PeftModel.from_pretrained(pico_base(), "alice/routed")
    torch.save(logits_of(model), work / "routed.pt")


def check_revisions(hub: Hub, work: Path):
    """A branch, a tag and a commit, in the reference or as the argument; the reference wins."""
    commit = API.model_info("alice/lib").sha
    API.create_tag("alice/lib", tag="v1", revision=commit)
    for reference, revision, names in (
        ("alice/lib@v2", None, ["sql", "dates"]),
        ("alice/lib", "v2", ["sql", "dates"]),
        ("alice/lib@v1", "v2", ["plurals", "dates", "sql"]),
        (f"alice/lib@{commit}", None, ["plurals", "dates", "sql"]),
    ):
        library = AdapterLibrary.from_pretrained(reference, revision=revision)
        assert list(library) == names
        wanted = commit if "plurals" in names else API.model_info("alice/lib", revision="v2").sha
        assert all(adapter.tensors.place.commit == wanted for adapter in library.values())
    assert library.select(["sql", "plurals"])["sql"].tensors.keys()
    with pytest.raises(ValueError, match=r"(?s)'alice/lib@v9'.*no such folder, and the Hub answered.*[Rr]evision"):
        AdapterLibrary.from_pretrained("alice/lib@v9")


def check_list_of_references(hub: Hub, work: Path):
    """An expert of a library, a repository, a private one with its own token, a library: all in a list."""
    hub.create("bob/single")
    theirs = HfApi(token="hf_bob")
    for path, data in make_adapter(work / "single", 7, "mit", r=2, target_modules=["v_proj"]).items():
        theirs.upload_file(path_or_fileobj=data, path_in_repo=path, repo_id="bob/single")
    theirs.create_tag("bob/single", tag="v1")
    first = theirs.model_info("bob/single").sha
    theirs.upload_file(path_or_fileobj=b"{}", path_in_repo="adapter_config.json", repo_id="bob/single")
    theirs.create_repo("bob/secret", private=True)
    theirs.upload_folder(repo_id="bob/secret", folder_path=work / "single", path_in_repo="loras/inner")
    secret = AdapterRef("bob/secret", subfolder="loras/inner", token="hf_bob", revision="main")
    references = ["alice/lib/experts/sql", "bob/single@v1", secret, "alice/lib@v2"]
    library = AdapterLibrary.from_pretrained(references)
    assert list(library) == ["sql", "single", "inner", "sql-2", "dates"]
    origins = [(adapter.origin.source, adapter.origin.license) for adapter in library.values()]
    # an expert asked for by its folder is an adapter like any other: its source is that folder
    assert origins[1:3] == [("bob/single", "mit"), ("bob/secret/loras/inner", "mit")]
    assert origins[3:] == [("sql", "apache-2.0"), ("dates", None)]
    assert library["single"].origin.commit == first
    assert torch.equal(*[next(iter(library[name].tensors.values())) for name in ("single", "inner")])
    manifest = library.save_pretrained(work / "mixed")
    assert manifest.experts[1].origin == library["single"].origin
    with pytest.raises(ValueError, match=r"bob/secret.*the Hub answered.*404"):
        AdapterLibrary.from_pretrained([replace(secret, token=None, cache_dir=str(work / "empty"))])
    model = ArrowLoraModel.from_pretrained(pico_base(), references)
    assert model.expert_names == list(library)


def check_origin_is_recorded(hub: Hub, work: Path):
    """`library.json` says where a pulled adapter came from, and a second pull does not change that."""
    manifest = Manifest.from_json((work / "mixed/library.json").read_text(), "mixed")
    single = next(record for record in manifest.experts if record.name == "single").origin
    assert (single.source, single.license, len(single.commit)) == ("bob/single", "mit", 40)
    AdapterLibrary.from_pretrained(work / "mixed").push_to_hub("alice/mixed")
    again = AdapterLibrary.from_pretrained("alice/mixed").save_pretrained(work / "again")
    assert again == manifest
    assert files_of(work / "again/experts") == files_of(work / "mixed/experts")
    text = ModelCard.load("alice/mixed").text
    assert f"https://huggingface.co/bob/single/tree/{single.commit}" in text


def check_pinned(hub: Hub, work: Path):
    """Files that are read later are those of the commit that was looked up first."""
    for folder, seed in (("before", 11), ("after", 12)):
        make_adapter(work / folder, seed, r=4, target_modules=["q_proj"])
    API.create_repo("alice/moves")
    old = API.upload_folder(repo_id="alice/moves", folder_path=work / "before").oid
    library = AdapterLibrary.from_pretrained(["alice/moves"])
    new = API.upload_folder(repo_id="alice/moves", folder_path=work / "after").oid
    header = library["moves"].tensors.header()
    library.save_pretrained(work / "pinned")
    assert (work / f"pinned/experts/moves/{WEIGHTS}").read_bytes() == (work / f"before/{WEIGHTS}").read_bytes()
    assert library["moves"].origin.commit == old != new
    assert len(header) == 4
    AdapterLibrary.from_pretrained(["alice/moves"]).save_pretrained(work / "pinned")
    assert (work / f"pinned/experts/moves/{WEIGHTS}").read_bytes() == (work / f"after/{WEIGHTS}").read_bytes()


def check_nothing_but_configs_until_weights_are_asked_for(hub: Hub, work: Path):
    """Looking a library up and reading headers downloads no weights."""
    library, asked = hub.asked_by(AdapterLibrary.from_pretrained, "alice/copy", cache_dir=str(work / "cache"))
    assert not [line for line in asked if line.endswith(WEIGHTS)]
    header, asked = hub.asked_by(library["sql"].tensors.header)
    assert {tensor.dtype for tensor in header.values()} == {"F32"}
    assert not list((work / "cache").rglob(WEIGHTS))


def check_snippets(hub: Hub, work: Path):
    """The Python blocks of the pushed READMEs run as they are."""
    wanted = {"alice/lib": 2, "alice/routed": 1}
    for repo_id, count in wanted.items():
        blocks = re.findall(r"```python\n(.*?)```", ModelCard.load(repo_id).text, re.DOTALL)
        assert len(blocks) == count
        for block in blocks:
            names: dict = {}
            exec(block, names)  # noqa: S102
            assert isinstance(names["model"], peft.PeftModel) and names["model"](TOKENS).logits.isfinite().all()
    base = LlamaForCausalLM.from_pretrained(BASE)
    assert torch.equal(logits_of(base), logits_of(pico_base()))


def main(work: str, only: str = ""):
    """Pull what `push_client` pushed."""
    run_checks(globals(), Hub(os.environ["HF_ENDPOINT"]), Path(work), only=only)


if __name__ == "__main__":
    main(*sys.argv[1:])
