"""What the test Hub holds: users, repositories, commits, refs, LFS objects. Data only; `hub_routes` serves it."""

from __future__ import annotations

import fnmatch
import hashlib
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path


LFS_PATTERNS = ("*.bin", "*.ckpt", "*.gguf", "*.npz", "*.pkl", "*.pt", "*.pth", "*.safetensors", "*.zip")
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
USERS = {"hf_alice": "alice", "hf_bob": "bob", "hf_reader": "reader"}


class HubError(Exception):
    """An answer other than success: its status, its message, more headers and, where there is one, X-Error-Code."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


@dataclass(frozen=True)
class Blob:
    """The content of a file; `lfs` says whether git holds a pointer to it."""

    data: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        """Digest of the content: the id and the ETag of an LFS file."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """The text that git holds for an LFS file."""
        lines = ["version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}", f"size {len(self.data)}"]
        return ("\n".join(lines) + "\n").encode()

    @cached_property
    def oid(self) -> str:
        """The id that `git hash-object` gives to what git holds."""
        held = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest()

    @property
    def etag(self) -> str:
        """What the ETag of a download and the `oid` of a preupload hold."""
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """All files at one point of a history."""

    oid: str
    parent: Commit | None
    title: str
    message: str
    author: str
    date: datetime
    files: dict[str, Blob]

    def history(self) -> list[Commit]:
        """This commit and those before it, newest first."""
        found, commit = [], self
        while commit is not None:
            found.append(commit)
            commit = commit.parent
        return found


@dataclass
class Pull:
    """A pull request: who opened it, the branch it is for, where it forked from it, its newest commit."""

    number: int
    author: str
    branch: str
    fork: Commit
    head: Commit
    status: str = "open"


@dataclass
class Repo:
    """A repository with its refs; `readers` may read it although it is private or gated."""

    type: str
    id: str
    private: bool = False
    gated: bool | str = False
    downloads: int = 0
    likes: int = 0
    readers: set[str] = field(default_factory=set)
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    pulls: dict[int, Pull] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        """The user or organization it belongs to."""
        return self.id.split("/")[0]

    def pull(self, revision: str) -> Pull | None:
        """The pull request that `refs/pr/N` names."""
        number = revision.removeprefix("refs/pr/")
        return self.pulls.get(int(number)) if number != revision and number.isdecimal() else None

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag, `refs/pr/N`, an id or the first seven digits of one stand for."""
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        if found := self.branches.get(name) or self.tags.get(name) or self.commits.get(revision):
            return found
        if pull := self.pull(revision):
            return pull.head
        matching = [commit for oid, commit in self.commits.items() if len(revision) >= 7 and oid.startswith(revision)]
        if len(matching) != 1:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return matching[0]

    def record(self, files: dict[str, Blob], parent: Commit | None, title: str, author: str, message="") -> Commit:
        """Make a commit that no ref points to yet."""
        content = "".join(f"{path}\0{blob.oid}\n" for path, blob in sorted(files.items()))
        above = parent.oid if parent else ""
        key = f"{self.type}/{self.id}\n{len(self.commits)}\n{above}\n{title}\n{content}"
        oid = hashlib.sha1(key.encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, message, author, datetime.now(UTC), files)
        return self.commits[oid]

    def move(self, revision: str, commit: Commit):
        """Let a branch or an open pull request point to `commit`."""
        if (pull := self.pull(revision)) and pull.status == "open":
            pull.head = commit
        elif revision in self.branches:
            self.branches[revision] = commit
        else:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def open_pull(self, branch: str, fork: Commit, head: Commit) -> Pull:
        """Open a pull request for `branch`."""
        if branch not in self.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        number = len(self.pulls) + 1
        self.pulls[number] = Pull(number, head.author, branch, fork, head)
        return self.pulls[number]

    def merge(self, number: int) -> Commit:
        """Put what an open pull request changed onto its branch."""
        pull = self.pulls[number]
        before, after, below = pull.fork.files, pull.head.files, self.branches[pull.branch]
        files = {path: blob for path, blob in below.files.items() if path in after or path not in before}
        files |= {path: blob for path, blob in after.items() if before.get(path) != blob}
        merged = self.record(files, below, f"{pull.head.title} (#{number})", self.namespace)
        self.branches[pull.branch] = merged
        pull.status = "merged"
        return merged


class Store:
    """Everything a Hub knows. Hold `lock` while reading or writing it from a thread."""

    def __init__(self, users: dict[str, str] | None = None, orgs: dict[str, list[str]] | None = None):
        self.lock = threading.RLock()
        self.users = dict(USERS if users is None else users)
        self.read_only = {"hf_reader"}
        self.orgs = {name: list(members) for name, members in (orgs or {}).items()}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.aliases: dict[tuple[str, str], str] = {}
        self.objects: dict[str, bytes] = {}
        self.collections: dict[str, dict] = {}
        self.mode, self.lfs_threshold, self.page_size = "lfs", 10 << 20, 1000

    def upload_mode(self, path: str, size: int) -> str:
        """How a file is uploaded: "lfs" for weights and for what is large, unless the server is in mode "regular"."""
        large = size >= self.lfs_threshold or any(fnmatch.fnmatch(path, pattern) for pattern in LFS_PATTERNS)
        return "lfs" if large and self.mode == "lfs" else "regular"

    def blob(self, path: str, data: bytes | str) -> Blob:
        """A file as an upload under `path` would store it."""
        data = data.encode() if isinstance(data, str) else bytes(data)
        return Blob(data, self.upload_mode(path, len(data)) == "lfs")

    def owns(self, user: str | None, namespace: str) -> bool:
        """Whether a user may write to a namespace: their own, or an organization they are a member of."""
        return user is not None and (user == namespace or user in self.orgs.get(namespace, ()))

    def may_read(self, user: str | None, repo: Repo) -> bool:
        """Whether the files of a private or gated repository are open to a user."""
        return self.owns(user, repo.namespace) or user in repo.readers

    def repo(self, repo_type: str, repo_id: str) -> Repo:
        """A repository, whoever asks; an old name works too."""
        repo = self.repos.get((repo_type, self.aliases.get((repo_type, repo_id), repo_id)))
        if repo is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repo

    def find(self, repo_type: str, repo_id: str, user: str | None) -> Repo:
        """A repository as `user` sees it: a private one of somebody else is not there."""
        repo = self.repos.get((repo_type, repo_id))
        if repo is None or (repo.private and not self.may_read(user, repo)):
            anonymous = user is None
            message = "Invalid username or password." if anonymous else "Repository not found"
            raise HubError(401 if anonymous else 404, message, "RepoNotFound")
        return repo

    def create(self, repo_type: str, repo_id: str, author: str, files: dict[str, Blob] | None = None) -> Repo:
        """A new repository with one commit on `main`."""
        repo = Repo(repo_type, repo_id)
        files = {".gitattributes": Blob(GITATTRIBUTES)} if files is None else files
        repo.branches["main"] = repo.record(files, None, "initial commit", author)
        self.repos[repo_type, repo_id] = repo
        self.aliases.pop((repo_type, repo_id), None)
        return repo

    def rename(self, repo_type: str, old: str, new: str):
        """Give a repository another id; the old one redirects to it."""
        repo = self.repos.pop((repo_type, old))
        repo.id = new
        self.repos[repo_type, new] = repo
        self.aliases = {key: new if target == old else target for key, target in self.aliases.items()}
        self.aliases[repo_type, old] = new

    def add_folder(self, root: Path):
        """Read ROOT/<user>/<repo>/<revision>/... into branches; `private-...` repositories are open to "reader"."""
        for folder in sorted(path for path in Path(root).glob("*/*") if path.is_dir()):
            revisions = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda p: p.name != "main")
            namespace = folder.parent.name
            repo = self.create("model", f"{namespace}/{folder.name}", namespace, {})
            repo.private = folder.name.startswith("private-")
            repo.readers = {"reader"}
            for revision in revisions:
                paths = sorted(path for path in revision.rglob("*") if path.is_file())
                names = [path.relative_to(revision).as_posix() for path in paths]
                files = {name: self.blob(name, path.read_bytes()) for name, path in zip(names, paths)}
                parent = repo.branches["main"]
                repo.branches[revision.name] = repo.record(files, parent, f"Add {revision.name}", namespace)
