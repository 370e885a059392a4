"""Folders to the Hub: save, then upload as one commit, with our card."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from .adapter import Adapter
from .base_ids import is_local_path
from .card import library_card
from .files import CARD_NAME
from .manifest import EXPERTS_FOLDER, MANIFEST_NAME, PICTURES_FOLDER
from .retrying import BUSY, RATE_LIMITED, retried
from .storage import write
from .versions import framework_versions


OTHER_MODELS = ("adapter_config.json", "config.json", "model_index.json", MANIFEST_NAME)
LIBRARY_FILES = (MANIFEST_NAME, f"{EXPERTS_FOLDER}/*", f"{PICTURES_FOLDER}/*")


def push_library(
    library: Mapping[str, Adapter],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload a library; experts that the repository holds and the library does not are deleted in the same commit.

    A push that was killed changes nothing, because the commit comes last; the next one sends only what is missing.

    Args:
        library (`AdapterLibrary`): what to push.
        repo_id (`str`): `user/repo`, or `repo` for your own; made if it does not exist.
        private (`bool`, *optional*): whether a new repository is private; by default as your account says.
        token (`str` or `bool`, *optional*): a token that may write.
        revision (`str`, *optional*): a branch, made if it does not exist.
        commit_message (`str`, *optional*): its first line.
        create_pr (`bool`): open a pull request instead of writing to the branch; also for repositories of others.

    Returns:
        `CommitInfo`: `.commit_url`, `.oid`, and `.pr_url` for a pull request.

    Raises:
        ValueError:
            the base model is named by a folder, the repository is a model of another kind, or it is public and
            `private` says otherwise.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
    """
    check_public_base(library.base_model_name_or_path, "make the library with base_model=<Hub id of the base>.")
    with tempfile.TemporaryDirectory(prefix="peft-arrow-") as folder:
        manifest = write(library, Path(folder))
        return push_folder(
            Path(folder),
            repo_id,
            card=lambda full_id: library_card(manifest, repo_id=full_id, versions=framework_versions()),
            files=LIBRARY_FILES,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message or f"Upload a library of {len(library)} LoRA experts",
            create_pr=create_pr,
        )


def check_public_base(base_model: str | None, remedy: str) -> None:
    """Raise a `ValueError` that ends with `remedy` where the base model has no name, or that of a folder."""
    if not base_model:
        raise ValueError(f"base_model {base_model!r} is no name that others can load it by; {remedy}")
    if is_local_path(base_model) or Path(base_model).is_dir():
        raise ValueError(f"base_model {base_model!r} is a folder of this machine, which others cannot load; {remedy}")


def check_push(repo_id: str, *, private: bool | None = None, token: str | bool | None = None) -> None:
    """Find out whether a push of a library can succeed, before hours of work; the Hub is asked and not changed.

    Raises:
        ValueError: the name is not allowed, the repository is of another kind or visibility, or the Hub is not asked.
        PermissionError: there is no token, or it may not write there.
        ConnectionError: the Hub cannot be reached, or is busy.
    """
    validate_repo_id(repo_id)
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"repo_id={repo_id!r} cannot be pushed to: HF_HUB_OFFLINE is set.")
    api = HfApi(token=token)
    try:
        user = retried(api.whoami)
        full_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
        _check_owner(full_id, user)
        if retried(api.repo_exists, full_id):
            _check_repo(api, full_id, private, MANIFEST_NAME)
    except LocalTokenNotFoundError as error:
        raise PermissionError(f"repo_id={repo_id!r}: there is no token; log in with `hf auth login`.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        kind = ConnectionError if status in BUSY else PermissionError
        raise kind(f"repo_id={repo_id!r}: the Hub answered {status}: {' '.join(str(error).split())}") from error


def _check_owner(repo_id: str, user: Mapping) -> None:
    """Refuse tokens that may only read, and other people's names; what a fine-grained token may do is not told."""
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    names = [user["name"], *(org["name"] for org in user.get("orgs") or ())]
    if role == "read":
        raise PermissionError(f"repo_id={repo_id!r}: the token of {user['name']!r} may only read.")
    if role != "fineGrained" and repo_id.partition("/")[0].casefold() not in [name.casefold() for name in names]:
        raise PermissionError(f"repo_id={repo_id!r}: {user['name']!r} may write to repositories of {names} only.")


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    card: Callable[[str], str],
    files: tuple[str, ...],
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
    create_pr: bool,
    commit_description: str | None = None,
) -> CommitInfo:
    """Upload a saved folder as one commit.

    Args:
        folder (`Path`): the saved folder; its card is written here, once the repository's full id is known.
        repo_id, private, token, revision, commit_message, create_pr, commit_description: as in `push_library`.
        card (`Callable[[str], str]`): makes the card from the repository's full id.
        files (`tuple[str, ...]`):
            what belongs to this kind of model: the first names the file it is known by; others that match and are not
            in the folder are deleted.
    """
    api = HfApi(token=token)
    full_id = retried(api.create_repo, repo_id, private=private, exist_ok=True).repo_id
    _check_repo(api, full_id, private, files[0])
    if revision is not None and not revision.startswith("refs/"):
        retried(api.create_branch, full_id, branch=revision, exist_ok=True)
    (folder / CARD_NAME).write_text(card(full_id), encoding="utf-8")
    return retried(
        api.upload_folder,
        # after another answer there may be a pull request already; the same commit twice is none
        statuses=(RATE_LIMITED,) if create_pr else BUSY,
        repo_id=full_id,
        folder_path=folder,
        revision=revision,
        commit_message=commit_message,
        commit_description=commit_description,
        create_pr=create_pr,
        delete_patterns=list(files),
    )


def _check_repo(api: HfApi, repo_id: str, private: bool | None, known_by: str) -> None:
    info = retried(api.model_info, repo_id)
    if private is not None and info.private is not None and info.private != private:
        is_now = "private" if info.private else "public"
        raise ValueError(
            f"private={private!r}: the repository {repo_id!r} exists and is {is_now}; change it in its settings, or "
            "leave private out."
        )
    names = [sibling.rfilename for sibling in info.siblings or []]
    other = [name for name in OTHER_MODELS if name in names and name != known_by]
    if other and known_by not in names:
        raise ValueError(
            f"repo_id={repo_id!r} holds a model of another kind ({other[0]}); push to a new repository, or delete the "
            "files there first."
        )
