"""A Hub on loopback, as much of it as reading adapters asks for: resolve (HEAD, GET), tree and model info.

Run `python -m tests.hub_server FOLDER`: serves FOLDER/<user>/<repo>/<revision>/..., prints its address, stops with
stdin. A repository named `private-...` wants the token `hf_reader`.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


TOKEN = "hf_reader"


class Handler(BaseHTTPRequestHandler):
    """Answers for the folder in `root`."""

    protocol_version = "HTTP/1.1"
    root: Path

    def log_message(self, *args):
        """Quiet."""

    def do_HEAD(self):
        """Headers of a file."""
        self.answer()

    def do_GET(self):
        """A file, or JSON about a repository."""
        self.answer()

    def answer(self):
        """Dispatch on the path."""
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "api":
            repo, verb = parts[2:4], parts[4] if len(parts) > 4 else "revision"
            revision = parts[5] if len(parts) > 5 else "main"
        else:
            repo, verb, revision = parts[:2], parts[2], parts[3]
        folder = self.root.joinpath(*repo)
        if not folder.is_dir() or (repo[1].startswith("private-") and not self.has_token()):
            return self.send(401 if not self.has_token() else 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if not (folder / revision).is_dir():
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = sorted(str(p.relative_to(folder / revision)) for p in (folder / revision).rglob("*") if p.is_file())
        if verb == "resolve":
            return self.send_file(folder / revision, "/".join(parts[4:]), revision)
        if verb == "tree":
            return self.send(
                200, json.dumps([{"type": "file", "path": f, "size": 1, "oid": "0"} for f in files]).encode()
            )
        info = {"id": "/".join(repo), "sha": sha(revision), "siblings": [{"rfilename": f} for f in files], "tags": []}
        return self.send(200, json.dumps(info).encode())

    def has_token(self) -> bool:
        """Whether the request carries the reader's token."""
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def send_file(self, folder: Path, name: str, revision: str):
        """A file with the headers that huggingface_hub reads."""
        if not (folder / name).is_file():
            return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha(revision)})
        data = (folder / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": sha(revision)}
        return self.send(200, data, headers)

    def send(self, status: int, body: bytes, headers: dict | None = None):
        """Status, headers, and for GET the body."""
        self.send_response(status)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def sha(revision: str) -> str:
    """A commit id for a revision."""
    return hashlib.sha1(revision.encode()).hexdigest()


def serve(folder: Path) -> tuple[ThreadingHTTPServer, str]:
    """Start a server on a free port of loopback; (server, address)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("FolderHandler", (Handler,), {"root": Path(folder)}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


if __name__ == "__main__":
    running, address = serve(Path(sys.argv[1]))
    print(address, flush=True)
    sys.stdin.read()
    running.shutdown()
