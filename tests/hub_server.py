"""A Hugging Face Hub on loopback for tests: users, repositories, commits, pull requests, and faults to order.

In a test: `with serve() as hub:`, then a client in a process of its own with `hub.environment(...)`, because the
process of the tests is offline. As a process: `python -m tests.hub_server [FOLDER]` prints its address and stops when
its stdin closes; `steer(address, "fail", "*/resolve/*", times=2)` calls the methods named in `STEERED` from outside.
FOLDER/<user>/<repo>/<revision>/... is served as repositories, those named `private-...` to the token `hf_reader` only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

from tests.hub_faults import Fault, Faults
from tests.hub_http import STEERING, Exchange, Server
from tests.hub_store import Store


TOKEN = "hf_reader"
ROOT = Path(__file__).parents[1]
STEERED = (
    "add_folder clear_faults commit corrupt create cut delay drop errors fail faults_ordered files log merge rename"
    " requests set"
).split()


class HubServer:
    """A running Hub; use it as a context manager or call `stop`.

    `requests` lists "METHOD path" of all that was asked, `log` also status, user and bytes sent, `errors` what the
    server could not read. `store` holds the data; the methods below change it from a test.
    """

    def __init__(self, store: Store, port: int = 0):
        self.store, self.faults = store, Faults()
        self.requests: list[str] = []
        self.log: list[Exchange] = []
        self.errors: list[str] = []
        self.server = Server(self, port)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *error):
        self.stop()

    def stop(self):
        """Stop listening and close the connections, so that a client sees a Hub that is gone."""
        self.server.shutdown()
        self.server.server_close()
        for connection in list(self.server.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def environment(self, home: Path, token: str | None = "hf_alice", **more: str) -> dict[str, str]:
        """The environment for a process with a client of this Hub."""
        return client_environment(self.endpoint, home, token, **more)

    # What it holds.

    def create(self, repo_id: str, files: Mapping | None = None, *, repo_type: str = "model", **settings) -> str:
        """A repository, with `set`'s settings, and a commit of `files`, if given; the id of the newest commit."""
        with self.store.lock:
            repo = self.store.create(repo_type, repo_id, repo_id.split("/")[0])
            self.set(repo_id, repo_type=repo_type, **settings)
            return self.commit(repo_id, files, repo_type=repo_type) if files else repo.at("main").oid

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, str | bytes | None],
        *,
        title: str = "A commit of the test",
        revision: str = "main",
        repo_type: str = "model",
    ) -> str:
        """Add and change files, delete those that are None, as the owner would; a new branch starts at main."""
        with self.store.lock:
            repo = self.store.repo(repo_type, repo_id)
            if not repo.pull(revision):
                repo.branches.setdefault(revision, repo.at("main"))
            parent = repo.at(revision)
            after = {path: blob for path, blob in parent.files.items() if path not in files}
            after |= {path: self.store.blob(path, data) for path, data in files.items() if data is not None}
            made = repo.record(after, parent, title, repo.namespace)
            repo.move(revision, made)
            return made.oid

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> list[str]:
        """The paths of a revision."""
        with self.store.lock:
            return sorted(self.store.repo(repo_type, repo_id).at(revision).files)

    def read(self, repo_id: str, path: str, revision: str = "main", repo_type: str = "model") -> bytes:
        """The content of a file."""
        with self.store.lock:
            return self.store.repo(repo_type, repo_id).at(revision).files[path].data

    def set(self, repo_id: str, *, repo_type: str = "model", **settings):
        """Change `private`, `gated`, `readers`, `downloads` or `likes`."""
        with self.store.lock:
            repo = self.store.repo(repo_type, repo_id)
            for name, value in settings.items():
                if name not in ("private", "gated", "readers", "downloads", "likes"):
                    raise ValueError(f"{name}: not a setting of a repository")
                setattr(repo, name, set(value) if name == "readers" else value)

    def rename(self, old: str, new: str, repo_type: str = "model"):
        """Give a repository another id, to which the old one redirects."""
        with self.store.lock:
            self.store.rename(repo_type, old, new)

    def merge(self, repo_id: str, number: int, repo_type: str = "model") -> str:
        """Merge a pull request; the id of the new commit."""
        with self.store.lock:
            return self.store.repo(repo_type, repo_id).merge(number).oid

    def add_folder(self, folder: str | Path):
        """Serve FOLDER/<user>/<repo>/<revision>/... too."""
        with self.store.lock:
            self.store.add_folder(Path(folder))

    # Faults. `pattern` is a shell pattern for the path, `*` matches slashes; `skip` requests pass, `times` are hit.

    def fail(
        self, pattern: str, method: str | None = None, *, status: int = 503, times: int | None = 1, **more
    ) -> Fault:
        """Refuse instead of doing what is asked; more: `headers`, `message`, `skip`."""
        return self.faults.add(Fault("fail", pattern, method, times, status=status, **more))

    def drop(self, pattern: str, method: str | None = None, *, times: int | None = 1, skip: int = 0) -> Fault:
        """Close the connection instead of doing what is asked."""
        return self.faults.add(Fault("drop", pattern, method, times, skip))

    def cut(
        self, pattern: str, after_bytes: int = 0, method: str | None = None, *, times: int | None = 1, skip: int = 0
    ) -> Fault:
        """Do what is asked, send the headers and so many bytes of the body, and close the connection."""
        return self.faults.add(Fault("cut", pattern, method, times, skip, after_bytes=after_bytes))

    def corrupt(
        self, pattern: str, at: int = 0, method: str | None = None, *, times: int | None = 1, skip: int = 0
    ) -> Fault:
        """Flip the byte `at` of the body, or the last one of a shorter body."""
        return self.faults.add(Fault("corrupt", pattern, method, times, skip, after_bytes=at))

    def delay(
        self, pattern: str, seconds: float, method: str | None = None, *, times: int | None = 1, skip: int = 0
    ) -> Fault:
        """Wait before doing what is asked."""
        return self.faults.add(Fault("delay", pattern, method, times, skip, seconds=seconds))

    def before(
        self, pattern: str, function: Callable, method: str | None = None, *, times: int | None = 1, skip: int = 0
    ) -> Fault:
        """Call a function of the test before doing what is asked, for example to commit in between."""
        return self.faults.add(Fault("call", pattern, method, times, skip, function=function))

    def clear_faults(self):
        """Forget the faults ordered so far."""
        self.faults.clear()

    def faults_ordered(self) -> list[dict]:
        """The faults ordered so far; `hits` says how often each was applied."""
        return [fault.summary() for fault in self.faults.ordered]

    def steer(self, name: str, call: dict) -> object:
        """Call a method, or read a list, for another process."""
        if name not in STEERED:
            raise ValueError(f"not one of {', '.join(STEERED)}")
        value = getattr(self, name)
        if callable(value):
            value = value(*call.get("args", ()), **call.get("kwargs", {}))
        if name == "log":
            value = [vars(exchange) for exchange in value]
        return value.summary() if isinstance(value, Fault) else value


def serve(
    folder: str | Path | None = None,
    *,
    users: dict[str, str] | None = None,
    orgs: dict[str, list[str]] | None = None,
    mode: str = "lfs",
    port: int = 0,
) -> HubServer:
    """Start a Hub on loopback, on a free port.

    Args:
        folder: FOLDER/<user>/<repo>/<revision>/... to serve as repositories.
        users: Token -> user; by default hf_alice, hf_bob and hf_reader, which may only read.
        orgs: Organization -> the users who may write to it.
        mode: "lfs" has weights uploaded by git-LFS, "regular" everything inside the commit.
        port: 0 for any.
    """
    store = Store(users, orgs)
    store.mode = mode
    if folder is not None:
        store.add_folder(Path(folder))
    return HubServer(store, port)


def client_environment(endpoint: str, home: Path, token: str | None = "hf_alice", **more: str) -> dict[str, str]:
    """The environment for a process that runs huggingface_hub against `endpoint`; `home` is for its cache."""
    dropped = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped) and not k.lower().endswith("_proxy")}
    chosen = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {**kept, **chosen, **quiet, "PYTHONPATH": str(ROOT), **({"HF_TOKEN": token} if token else {}), **more}


def steer(endpoint: str, name: str, *args, **kwargs) -> object:
    """Call one of the methods `STEERED` of a Hub in another process, with arguments that JSON allows."""
    connection = HTTPConnection(urlsplit(endpoint).netloc, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", STEERING + name, json.dumps({"args": args, "kwargs": kwargs}))
        answer = json.loads(connection.getresponse().read())
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["value"]


@contextlib.contextmanager
def spawn(*arguments: str) -> Iterator[str]:
    """Run `python -m tests.hub_server ARGUMENTS` for the length of a `with`; its address."""
    command = [sys.executable, "-m", "tests.hub_server", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()
            process.wait(10)


def main():
    """Serve until stdin closes."""
    parser = argparse.ArgumentParser(prog="python -m tests.hub_server", description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", help="FOLDER/<user>/<repo>/<revision>/... to serve")
    parser.add_argument("--mode", choices=("lfs", "regular"), default="lfs", help="how weights are uploaded")
    parser.add_argument("--port", type=int, default=0, help="0 for any")
    options = parser.parse_args()
    with serve(options.folder, mode=options.mode, port=options.port) as hub:
        print(hub.endpoint, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
