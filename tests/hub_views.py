"""What the test Hub tells about its repositories, as the JSON that huggingface_hub parses."""

from __future__ import annotations

import hashlib
import re
from datetime import datetime

import yaml

from tests.hub_store import Blob, Commit, Repo


FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n?^---[ \t]*$", re.DOTALL | re.MULTILINE)
# Fields of a card that must be a string, or a list of strings.
STRINGS = ("license", "library_name", "pipeline_tag", "base_model", "datasets", "language")
LISTS = ("base_model", "datasets", "language", "tags")
# What a listing tells about each model when nothing more is asked for.
SHORT = "_id id modelId likes private downloads tags pipeline_tag library_name createdAt".split()


def stamp(date: datetime) -> str:
    """A date as the Hub writes it."""
    return date.strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def object_id(name: str) -> str:
    """A stable id of 24 digits, as of a database."""
    return hashlib.sha1(name.encode()).hexdigest()[:24]


def strings(value: object) -> list[str]:
    """A field that holds a string or a list of them."""
    return [value] if isinstance(value, str) else [str(entry) for entry in value or ()]


def check_card(text: str) -> tuple[dict, list[str], list[str]]:
    """Read the front matter of a README; (metadata, errors, warnings)."""
    match = FRONT_MATTER.match(text)
    try:
        card = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        return {}, [f"Error while parsing YAML: {error}"], []
    if card is None:
        return {}, [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(card, dict):
        return {}, ["metadata must be a mapping"], []
    errors = []
    for name in {*STRINGS, *LISTS} & {key for key, value in card.items() if value is not None}:
        value = card[name]
        listed = name in LISTS and isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        if not listed and not (name in STRINGS and isinstance(value, str)):
            kinds = [kind for kind, names in (("a string", STRINGS), ("an array of strings", LISTS)) if name in names]
            errors.append(f'"{name}" must be {" or ".join(kinds)}')
    return card, sorted(errors), []


def card_of(commit: Commit) -> dict:
    """The metadata of the README of a commit, {} where there is none that can be read."""
    readme = commit.files.get("README.md")
    card, errors, _ = check_card(readme.data.decode(errors="replace") if readme else "")
    return {} if errors else card


def library_of(card: dict, commit: Commit) -> str | None:
    """The library a card names, or PEFT for an adapter at the root."""
    return card.get("library_name") or ("peft" if "adapter_config.json" in commit.files else None)


def tags_of(card: dict, commit: Commit) -> list[str]:
    """The tags that the Hub derives from the metadata and the files."""
    library = library_of(card, commit)
    relation = card.get("base_model_relation") or ("adapter" if library == "peft" else "finetune")
    bases = strings(card.get("base_model"))
    tags = [
        *([library] if library else []),
        *(["safetensors"] if any(path.endswith(".safetensors") for path in commit.files) else []),
        *strings(card.get("tags")),
        *strings(card.get("pipeline_tag")),
        *strings(card.get("language")),
        *(f"dataset:{name}" for name in strings(card.get("datasets"))),
        *(f"base_model:{name}" for name in bases),
        *(f"base_model:{relation}:{name}" for name in bases),
        *(f"license:{name}" for name in strings(card.get("license"))),
        "region:us",
    ]
    return list(dict.fromkeys(tags))


def lfs_of(blob: Blob, key: str) -> dict:
    """What is told about an LFS file; `key` names the digest: "oid" in trees, "sha256" in siblings."""
    if not blob.lfs:
        return {}
    return {"lfs": {key: blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}}


def sibling(path: str, blob: Blob, blobs: bool) -> dict:
    """A file in the answer of model_info."""
    more = {"size": len(blob.data), "blobId": blob.oid, **lfs_of(blob, "sha256")} if blobs else {}
    return {"rfilename": path, **more}


def info_of(repo: Repo, commit: Commit, blobs: bool = False) -> dict:
    """All that is told about a repository at a commit."""
    card = card_of(commit)
    return {
        "_id": object_id(f"{repo.type}/{repo.id}"),
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.namespace,
        "sha": commit.oid,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": repo.downloads,
        "likes": repo.likes,
        "trendingScore": 0,
        "tags": tags_of(card, commit),
        "library_name": library_of(card, commit),
        "pipeline_tag": card.get("pipeline_tag"),
        "createdAt": stamp(repo.created),
        "lastModified": stamp(commit.date),
        "cardData": card,
        "siblings": [sibling(path, blob, blobs) for path, blob in sorted(commit.files.items())],
    }


def expanded(info: dict, names: list[str]) -> dict:
    """Only the fields that `expand` asks for."""
    return {key: value for key, value in info.items() if key in ("_id", "id", *names)}


def listed(info: dict, full: bool, card: bool, names: list[str]) -> dict:
    """What a listing tells about a repository."""
    if names:
        return expanded(info, names)
    told = (set(info) if full else set(SHORT)) - {"cardData"} | ({"cardData"} if card else set())
    return {key: value for key, value in info.items() if key in told}


def file_entry(path: str, blob: Blob) -> dict:
    """A file in a tree."""
    return {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid, **lfs_of(blob, "oid")}


def folder_entry(path: str, commit: Commit) -> dict:
    """A folder in a tree."""
    inside = [f"{name}\0{blob.oid}" for name, blob in sorted(commit.files.items()) if name.startswith(path + "/")]
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1("\n".join(inside).encode()).hexdigest()}


def folders_of(commit: Commit) -> list[str]:
    """Every folder that holds a file."""
    parts = [path.split("/") for path in commit.files]
    return sorted({"/".join(names[:length]) for names in parts for length in range(1, len(names))})


def tree_of(commit: Commit, folder: str = "", recursive: bool = False) -> list[dict]:
    """The entries under a folder."""
    prefix = f"{folder}/" if folder else ""

    def shown(path: str) -> bool:
        return path.startswith(prefix) and (recursive or "/" not in path.removeprefix(prefix))

    folders = [folder_entry(path, commit) for path in folders_of(commit) if shown(path)]
    return folders + [file_entry(path, blob) for path, blob in sorted(commit.files.items()) if shown(path)]


def refs_of(repo: Repo, pulls: bool) -> dict:
    """Branches, tags and, if asked for, pull requests."""
    named = lambda prefix, refs: [  # noqa: E731
        {"name": name, "ref": f"{prefix}{name}", "targetCommit": commit.oid} for name, commit in refs.items()
    ]
    answer = {"branches": named("refs/heads/", repo.branches), "converts": [], "tags": named("refs/tags/", repo.tags)}
    if pulls:
        heads = {f"refs/pr/{number}": pull.head for number, pull in repo.pulls.items() if pull.status == "open"}
        answer["pullRequests"] = named("", heads)
    return answer


def commit_entry(commit: Commit) -> dict:
    """A commit in a history."""
    authors = [{"user": commit.author}]
    entry = {"id": commit.oid, "title": commit.title, "message": commit.message, "authors": authors}
    return {**entry, "date": stamp(commit.date)}
