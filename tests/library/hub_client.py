"""What the real huggingface_hub does with the test Hub at HF_ENDPOINT; `test_hub_server` runs this as a process."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import save

from tests.hub_server import TOKEN, steer


CARD = "---\nlibrary_name: peft\ntags: [arrow]\nbase_model: x/y\nlicense: mit\ndatasets: [d/e]\n---\n# Card\n"
ADAPTER = {
    "README.md": CARD.encode(),
    "adapter_config.json": b"{}",
    "adapter_model.safetensors": save({"w": torch.zeros(100, 1000)}),
}
# What the client says when a connection ends too early. Version 0 neither repeats such a request nor one answered 429.
LOST = "disconnected|peer closed|aborted|IncompleteRead|Connection broken"
TRIES_ONCE = huggingface_hub.__version__.startswith("0.")


class Client:
    """Alice at a Hub, with an own cache."""

    def __init__(self, mode: str):
        self.mode = mode
        self.api, self.bob, self.nobody = HfApi(), HfApi(token="hf_bob"), HfApi(token=False)
        self.endpoint = self.api.endpoint

    def push(self, name: str) -> str:
        """A repository with the files of an adapter."""
        self.api.create_repo(name, exist_ok=True)
        operations = [CommitOperationAdd(path, data) for path, data in ADAPTER.items()]
        return self.api.create_commit(name, operations, commit_message="Add the adapter").oid

    def read(self, name: str, path: str, **more) -> bytes:
        """A file, downloaded anew."""
        return Path(hf_hub_download(name, path, force_download=True, **more)).read_bytes()

    def steer(self, name: str, *args, **kwargs):
        """Tell the server something that is not part of a Hub."""
        return steer(self.endpoint, name, *args, **kwargs)


def refused(status: int, function, *args, error: type = HfHubHTTPError, **kwargs):
    """Expect an error of the Hub."""
    with pytest.raises(error) as raised:
        function(*args, **kwargs)
    assert raised.value.response.status_code == status, raised.value


def check_repositories(client: Client):
    """Create, find, rename, delete."""
    api = client.api
    assert api.whoami()["name"] == "alice"
    assert api.create_repo("alice/new").endswith("/alice/new")
    assert api.create_repo("alice/new", exist_ok=True).repo_id == "alice/new"
    refused(409, api.create_repo, "alice/new")
    refused(403, api.create_repo, "bob/new")
    assert api.list_repo_files("alice/new") == [".gitattributes"]
    api.move_repo("alice/new", "alice/newer")
    assert api.model_info("alice/new").id == "alice/newer"
    assert client.read("alice/new", ".gitattributes").startswith(b"*.bin")
    api.upload_file(path_or_fileobj=b"1", path_in_repo="one", repo_id="alice/new")
    assert api.file_exists("alice/newer", "one")
    api.delete_repo("alice/newer")
    assert not api.repo_exists("alice/newer")
    api.create_repo("alice/data", repo_type="dataset", private=True)
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="a/b.json", repo_id="alice/data", repo_type="dataset")
    assert client.read("alice/data", "a/b.json", repo_type="dataset") == b"{}"
    assert api.dataset_info("alice/data").private and not client.bob.repo_exists("alice/data", repo_type="dataset")


def check_commits(client: Client):
    """Uploads, unchanged uploads, deletions, conflicts, history, the modes of upload."""
    api, name = client.api, "alice/commits"
    first = client.push(name)
    large = api.get_paths_info(name, ["adapter_model.safetensors"])[0]
    assert large.size == len(ADAPTER["adapter_model.safetensors"]) and bool(large.lfs) == (client.mode == "lfs")
    assert client.read(name, "adapter_model.safetensors") == ADAPTER["adapter_model.safetensors"]
    assert client.push(name) == first
    operations = [CommitOperationAdd("deep/er/x.txt", b"x"), CommitOperationDelete("adapter_config.json")]
    second = api.create_commit(
        name, operations, commit_message="Second", commit_description="Why", parent_commit=first
    )
    more = [CommitOperationAdd("y", b"y")]
    refused(412, api.create_commit, name, more, commit_message="Late", parent_commit=first)
    refused(404, api.delete_file, "nothing", name, error=EntryNotFoundError)
    assert [c.commit_id for c in api.list_repo_commits(name)][:2] == [second.oid, first]
    assert [entry.path for entry in api.list_repo_tree(name, "deep")] == ["deep/er"]
    assert [entry.path for entry in api.list_repo_tree(name, "deep", recursive=True)] == ["deep/er", "deep/er/x.txt"]
    assert "adapter_config.json" in api.list_repo_files(name, revision=first[:8])
    api.delete_folder("deep", name)
    assert sorted(api.list_repo_files(name)) == [".gitattributes", "README.md", "adapter_model.safetensors"]
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        api.upload_file(path_or_fileobj=b"---\na: [\n---\n", path_in_repo="README.md", repo_id=name)


def check_pull_requests(client: Client):
    """Who may not write proposes; main stays as it is until the merge."""
    name, add = "alice/pulls", {"path_or_fileobj": b"theirs", "repo_id": "alice/pulls"}
    before = client.push(name)
    refused(403, client.bob.upload_file, path_in_repo="theirs", **add)
    with tempfile.TemporaryDirectory() as folder:
        for path, data in ADAPTER.items():
            Path(folder, path).write_bytes(data)
        info = client.bob.upload_folder(repo_id=name, folder_path=folder, path_in_repo="b", create_pr=True)
    assert (info.pr_num, info.pr_revision) == (1, "refs/pr/1") and info.pr_url.endswith("alice/pulls/discussions/1")
    client.bob.upload_file(path_in_repo="theirs", revision="refs/pr/1", **add)
    assert client.read(name, "theirs", revision="refs/pr/1") == b"theirs"
    assert "b/README.md" in client.api.list_repo_files(name, revision="refs/pr/1")
    assert client.api.upload_file(path_in_repo="z", create_pr=True, **add).pr_num == 2
    refs = client.api.list_repo_refs(name, include_pull_requests=True)
    assert refs.branches[0].target_commit == before
    assert [ref.ref for ref in refs.pull_requests] == ["refs/pr/1", "refs/pr/2"]
    client.api.upload_file(path_in_repo="mine", **add)
    client.steer("merge", name, 1)
    assert {"mine", "theirs", "b/adapter_config.json"} < set(client.api.list_repo_files(name))
    refused(404, client.bob.upload_file, path_in_repo="late", revision="refs/pr/1", **add, error=RevisionNotFoundError)


def check_refs(client: Client):
    """Branches and tags."""
    api, name = client.api, "alice/refs"
    first = client.push(name)
    api.create_tag(name, tag="v1")
    api.create_tag(name, tag="v1", exist_ok=True)
    refused(409, api.create_tag, name, tag="v1")
    api.create_branch(name, branch="dev/one")
    refused(409, api.create_branch, name, branch="dev/one")
    refused(404, api.create_branch, name, branch="two", revision="nope", error=RevisionNotFoundError)
    api.upload_file(path_or_fileobj=b"new", path_in_repo="x", repo_id=name, revision="dev/one")
    api.upload_file(path_or_fileobj=b"main", path_in_repo="x", repo_id=name)
    assert client.read(name, "x", revision="dev/one") == b"new" and client.read(name, "x") == b"main"
    assert api.model_info(name, revision="v1").sha == first
    refused(404, hf_hub_download, name, "x", revision="v1", error=EntryNotFoundError)
    refused(404, hf_hub_download, name, "x", revision="v2", error=RevisionNotFoundError)
    api.delete_branch(name, branch="dev/one")
    api.delete_tag(name, tag="v1")
    refs = api.list_repo_refs(name)
    assert ([ref.name for ref in refs.branches], refs.tags) == (["main"], [])


def check_search(client: Client):
    """Tags out of the card, and searches by them."""
    api = client.api
    for number, name in enumerate(("find-one", "find-two", "find-three")):
        client.push(f"alice/{name}")
        client.steer("set", f"alice/{name}", downloads=number, likes=3 - number)
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# No card", path_in_repo="README.md", repo_id="alice/find-three")
    info = api.model_info("alice/find-one", files_metadata=True)
    expected = [
        "base_model:x/y",
        "base_model:adapter:x/y",
        "license:mit",
        "dataset:d/e",
        "arrow",
        "peft",
        "safetensors",
    ]
    assert set(expected) <= set(info.tags) and info.card_data.base_model == "x/y" and info.library_name == "peft"
    assert {s.rfilename: s.size for s in info.siblings}["adapter_config.json"] == 2

    def names(**asked) -> list[str]:
        return [model.id.removeprefix("alice/find-") for model in api.list_models(search="FIND-", **asked)]

    assert names(filter=["arrow", "base_model:adapter:x/y"]) == ["one", "two"]
    assert names(filter=["arrow", "nope"]) == names(author="bob") == []
    assert names(sort="downloads") == ["three", "two", "one"]
    assert names(sort="downloads", limit=2, author="alice") == ["three", "two"]
    assert names(sort="likes", limit=1, expand=["likes"]) == ["one"]
    page = list(api.list_models(filter="arrow", search="find-one", cardData=True))
    assert page[0].card_data["license"] == "mit" and page[0].downloads == 0 and page[0].sha is None
    assert list(api.list_models(search="find-one", full=True))[0].siblings


def check_downloads(client: Client):
    """Snapshots, and the header of a safetensors file without the rest."""
    api, name = client.api, "alice/downloads"
    client.push(name)
    folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert snapshot_download(name, allow_patterns=["*.json"], local_files_only=True) == str(folder)
    header = api.parse_safetensors_file_metadata(name, "adapter_model.safetensors")
    assert header.tensors["w"].shape == [100, 1000]
    last = client.steer("log")[-1]
    assert (last["status"], last["sent"], last["user"]) == (206, 100_001, "alice")


def check_access(client: Client):
    """Private, gated, unknown, and tokens that say nothing."""
    api, name = client.api, "alice/access"
    client.push(name)
    refused(404, api.model_info, "alice/nothing", error=RepositoryNotFoundError)
    refused(401, client.nobody.model_info, "alice/nothing", error=RepositoryNotFoundError)
    refused(401, HfApi(token="hf_wrong").model_info, name)
    refused(403, HfApi(token=TOKEN).create_repo, "reader/new")
    client.steer("set", name, gated="manual")
    assert client.bob.model_info(name).gated == "manual"
    refused(403, client.bob.hf_hub_download, name, "README.md", error=GatedRepoError)
    refused(401, client.nobody.hf_hub_download, name, "README.md", error=GatedRepoError)
    client.steer("set", name, readers=["bob"])
    assert client.bob.hf_hub_download(name, "README.md")
    client.steer("set", name, gated=False, private=True, readers=[])
    refused(404, client.bob.model_info, name, error=RepositoryNotFoundError)
    refused(401, client.nobody.list_repo_files, name, error=RepositoryNotFoundError)
    assert api.model_info(name).private


def check_faults(client: Client):
    """Refusals, cut, damaged, late and lost answers."""
    api, name, weights = client.api, "alice/faults", ADAPTER["adapter_model.safetensors"]
    client.push(name)
    client.steer("fail", "*/paths-info/*", status=418, times=1, skip=1)
    assert api.get_paths_info(name, ["README.md"])
    refused(418, api.get_paths_info, name, ["README.md"])
    assert api.get_paths_info(name, ["README.md"])
    client.steer("fail", "*/tree/*", "GET", status=429, times=1, headers={"Retry-After": "0"})
    if TRIES_ONCE:
        refused(429, api.list_repo_files, name)
    assert api.list_repo_files(name)
    client.steer("cut", "*/adapter_model.safetensors", 1000)
    if TRIES_ONCE:
        with pytest.raises(OSError, match=LOST):
            client.read(name, "adapter_model.safetensors")
    assert client.read(name, "adapter_model.safetensors") == weights
    client.steer("corrupt", "*/adapter_model.safetensors", at=12)
    damaged = client.read(name, "adapter_model.safetensors")
    assert [i for i, (a, b) in enumerate(zip(damaged, weights)) if a != b] == [12] and len(damaged) == len(weights)
    client.steer("delay", "*/refs", 0.3)
    start = time.monotonic()
    api.list_repo_refs(name)
    assert time.monotonic() - start > 0.3
    client.steer("drop", "*/commit/*", "POST")
    client.steer("cut", "*/commit/*", 0, "POST")
    for expected in (False, True):
        with pytest.raises(Exception, match=LOST):
            api.upload_file(path_or_fileobj=b"x", path_in_repo="lost", repo_id=name)
        assert api.file_exists(name, "lost") is expected
    assert all(fault["hits"] == 1 for fault in client.steer("faults_ordered"))
    client.steer("clear_faults")


def check_collections(client: Client):
    """A collection with a repository in it."""
    client.push("alice/item")
    made = client.api.create_collection("My LoRAs", description="All", exists_ok=True)
    client.api.add_collection_item(made.slug, "alice/item", "model", note="first")
    refused(409, client.api.add_collection_item, made.slug, "alice/item", "model")
    item = client.api.get_collection(made.slug).items[0]
    client.api.update_collection_item(made.slug, item.item_object_id, note="second")
    assert client.nobody.get_collection(made.slug).items[0].note == "second"
    assert [found.title for found in client.api.list_collections(owner="alice", item="models/alice/item")] == [
        "My LoRAs"
    ]
    assert client.api.update_collection_metadata(made.slug, title="Mine").title == "Mine"
    client.api.delete_collection_item(made.slug, item.item_object_id)
    client.api.delete_collection(made.slug)
    refused(404, client.api.get_collection, made.slug)


def main(mode: str):
    """Run the functions `check_*`, and name each once it has passed."""
    client = Client(mode)
    print(huggingface_hub.__version__)
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check(client)
            print(name, flush=True)
    assert client.steer("errors") == []


if __name__ == "__main__":
    main(sys.argv[1])
