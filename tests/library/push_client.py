"""What a user pushes, and what the Hub holds afterwards; `test_hub_roundtrip` runs this as a process."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from peft_arrow import AdapterLibrary, ArrowLoraModel, push_to_hub
from tests.library.hub_runs import BASE, Hub, files_of, run_checks
from tests.pico import pico_base


API = HfApi()


def head(repo_id: str, revision: str | None = None) -> str:
    """The newest commit of a revision."""
    return API.model_info(repo_id, revision=revision).sha


def refused(hub: Hub, repo_id: str, library, match: str, error: type = ValueError, **options):
    """Expect an error, and that nothing was uploaded."""
    before = len(hub.requests())
    with pytest.raises(error, match=match):
        library.push_to_hub(repo_id, **options)
    assert not [line for line in hub.requests()[before:] if line.startswith("PUT") or "/commit/" in line]


def routed_model(library):
    """A routed model of the base under its Hub id."""
    base = pico_base()
    base.config._name_or_path = base.name_or_path = BASE
    return ArrowLoraModel.from_pretrained(base, library, top_k=2)


def check_new_repo(hub: Hub, library, work: Path):
    """The files of `save_pretrained`, found by the base's tag, with our card."""
    commit = library.push_to_hub("alice/lib")
    library.save_pretrained(work / "saved")
    written = files_of(work / "saved")
    assert hub.files("alice/lib") == sorted([".gitattributes", *written])
    for path in ("library.json", "experts/dates/adapter_config.json", "experts/sql/adapter_model.safetensors"):
        assert Path(API.hf_hub_download("alice/lib", path)).read_bytes() == written[path]
    assert commit.oid == head("alice/lib") and commit.commit_url.endswith(commit.oid)
    assert API.list_repo_commits("alice/lib")[0].title == "Upload a library of 3 LoRA experts"
    assert not API.model_info("alice/lib").private
    found = [info.id for info in API.list_models(filter=f"base_model:adapter:{BASE}")]
    assert "alice/lib" in found


def check_card(hub: Hub, library):
    """The README on the Hub is ours and names the repository in full."""
    card = ModelCard.load("alice/lib")
    assert card.data.base_model == BASE and {"peft-arrow", "lora"} <= set(card.data.tags)
    assert card.data.library_name == "peft" and card.data.base_model_relation == "adapter"
    assert f'ArrowLoraModel.from_pretrained("{BASE}", "alice/lib")' in card.text
    assert 'PeftModel.from_pretrained(base, "alice/lib", subfolder="experts/plurals")' in card.text
    assert all(name in card.text for name in library)


def check_unchanged(hub: Hub, library):
    """The same library again is no new commit, and no weights are sent."""
    before = head("alice/lib")
    info, asked = hub.asked_by(library.push_to_hub, "alice/lib")
    assert head("alice/lib") == before == info.oid
    assert not [line for line in asked if line.startswith("PUT") or "/commit/" in line]


def check_removed_expert(hub: Hub, library):
    """What the library no longer holds goes in the same commit; what is not ours stays."""
    library.push_to_hub("alice/shrinks")
    API.upload_file(path_or_fileobj=b"mine", path_in_repo="notes/mine.txt", repo_id="alice/shrinks")
    before = len(API.list_repo_commits("alice/shrinks"))
    library.without("dates").rename({"sql": "queries"}).push_to_hub("alice/shrinks", commit_message="Fewer")
    files = hub.files("alice/shrinks")
    assert {path.split("/")[1] for path in files if path.startswith("experts/")} == {"plurals", "queries"}
    assert "notes/mine.txt" in files
    commits = API.list_repo_commits("alice/shrinks")
    assert len(commits) == before + 1 and commits[0].title == "Fewer"
    assert list(AdapterLibrary.from_pretrained("alice/shrinks")) == ["plurals", "queries"]


def check_repo_without_user(hub: Hub, library):
    """A name alone is a repository of the user, with the full id in the card."""
    library.select("sql").push_to_hub("mine")
    card = ModelCard.load("alice/mine").text
    assert '"alice/mine"' in card and '"mine"' not in card


def check_private(hub: Hub, library):
    """A new private repository; a repository that is not what `private` says is left alone."""
    library.push_to_hub("alice/secret", private=True)
    assert API.model_info("alice/secret").private
    assert not HfApi(token="hf_bob").repo_exists("alice/secret")
    library.without("sql").push_to_hub("alice/secret")
    assert API.model_info("alice/secret").private and not any("sql" in path for path in hub.files("alice/secret"))
    refused(hub, "alice/secret", library, "exists and is private", private=False)
    refused(hub, "alice/lib", library, "exists and is public", private=True)


def check_branch(hub: Hub, library):
    """A branch is made; main stays."""
    before = head("alice/lib")
    info = library.select(["sql", "dates"]).push_to_hub("alice/lib", revision="v2")
    assert head("alice/lib") == before != head("alice/lib", "v2") == info.oid
    library.select(["dates"]).push_to_hub("alice/lib", revision="v2")
    assert list(AdapterLibrary.from_pretrained("alice/lib", revision="v2")) == ["dates"]
    library.select(["sql", "dates"]).push_to_hub("alice/lib", revision="v2")
    assert head("alice/lib") == before


def check_pull_requests(hub: Hub, library):
    """Proposed to an own repository, and to one of somebody else, whose main stays as it is."""
    before = head("alice/lib")
    info = library.without("sql").push_to_hub("alice/lib", create_pr=True)
    assert info.pr_url.endswith("alice/lib/discussions/1") and head("alice/lib") == before
    assert list(AdapterLibrary.from_pretrained("alice/lib@refs/pr/1")) == ["plurals", "dates"]
    library.without("plurals").push_to_hub("bob/lib", token="hf_bob")
    theirs = head("bob/lib")
    info = library.push_to_hub("bob/lib", create_pr=True, commit_message="Add plurals")
    assert info.pr_url.endswith("bob/lib/discussions/1") and head("bob/lib") == theirs
    hub.merge("bob/lib", 1)
    assert list(AdapterLibrary.from_pretrained("bob/lib")) == list(library)
    refused(hub, "bob/lib", library, "403", HfHubHTTPError)


def check_refused(hub: Hub, library, work: Path):
    """Another model's repository, a base that others cannot load, no rights: said before anything is sent."""
    hub.create("alice/other", {"adapter_config.json": "{}"})
    refused(hub, "alice/other", library, r"holds a model of another kind \(adapter_config.json\)")
    local = AdapterLibrary(library, base_model=str(work))
    refused(hub, "alice/new", local, "is a folder of this machine, which others cannot load; make the library with")
    refused(hub, "guild/lib", library, "403", HfHubHTTPError)
    refused(hub, "alice/new", library, "403", HfHubHTTPError, token="hf_reader")
    refused(hub, "alice/new", library, "401", HfHubHTTPError, token="hf_wrong")
    refused(hub, "alice/new", library, "401", HfHubHTTPError, token=False)
    refused(hub, "alice/nothing/at/all", library, "alice/nothing/at/all")
    with pytest.raises(RepositoryNotFoundError):
        API.model_info("alice/new")
    library.push_to_hub("lab/lib")
    assert head("lab/lib")


def check_routed(hub: Hub, library, work: Path):
    """A routed model with our card, by the function and by the method that PEFT's would replace the card in."""
    model = routed_model(library)
    info = push_to_hub(model, "alice/routed", tags=["my-tag"])
    assert info.oid == head("alice/routed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.push_to_hub("routed-two", private=True, commit_message="Mine", max_shard_size="1GB")
    assert API.model_info("alice/routed-two").private and API.list_repo_commits("alice/routed-two")[0].title == "Mine"
    expected = [".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"]
    for name in ("alice/routed", "alice/routed-two"):
        card = ModelCard.load(name)
        assert hub.files(name) == expected
        assert card.data.base_model == BASE and "peft-arrow" in card.data.tags
        assert (
            f'PeftModel.from_pretrained(base, "{name}")' in card.text and "[More Information Needed]" not in card.text
        )
        assert all(f"`{expert}`" in card.text for expert in library)
    assert "my-tag" in ModelCard.load("alice/routed").data.tags
    before = head("alice/routed")
    assert push_to_hub(model, "alice/routed", tags=["my-tag"]).oid == before
    assert model.push_to_hub("alice/routed", create_pr=True, commit_message="Again").pr_url
    model.push_to_hub("alice/routed", revision="v2")
    assert head("alice/routed") == before
    with pytest.raises(ValueError, match=r"another kind \(library.json\)"):
        push_to_hub(model, "alice/lib")
    with pytest.raises(ValueError, match="only routed models are pushed"):
        push_to_hub(pico_base(), "alice/new")
    for name in (str(work), None):
        model.base_model.model.name_or_path = model.active_peft_config.base_model_name_or_path = name
        with pytest.raises(ValueError, match="set model.active_peft_config.base_model_name_or_path"):
            push_to_hub(model, "alice/new")


def check_plain_peft_is_left_alone(hub: Hub, library):
    """PEFT's own adapters are pushed as PEFT pushes them."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(pico_base(), LoraConfig(target_modules=["q_proj"]))
    model.push_to_hub("alice/plain")
    assert "adapter_model.safetensors" in hub.files("alice/plain")
    assert "peft-arrow" not in (ModelCard.load("alice/plain").data.tags or [])


def check_from_the_hub_to_the_hub(hub: Hub, library):
    """A library on the Hub is pushed elsewhere under its own sources, without a folder in between."""
    AdapterLibrary.from_pretrained("alice/lib").push_to_hub("alice/copy")
    copy = AdapterLibrary.from_pretrained("alice/copy")
    assert [adapter.origin for adapter in copy.values()] == [
        adapter.origin for adapter in AdapterLibrary.from_pretrained("alice/lib").values()
    ]
    assert all(torch.equal(copy["sql"].tensors[key], value) for key, value in library["sql"].tensors.items())


def main(work: str, only: str = ""):
    """Push the library of folder `work/library`."""
    hub = Hub(os.environ["HF_ENDPOINT"])
    library = AdapterLibrary.from_pretrained(Path(work, "library"))
    run_checks(globals(), hub, library, Path(work), only=only)


if __name__ == "__main__":
    main(*sys.argv[1:])
