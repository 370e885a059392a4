"""The test Hub itself: the real client against it in another process, and what only its own process can do."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from http.client import HTTPConnection, RemoteDisconnected

import pytest

from tests.hub_server import ROOT, TOKEN, client_environment, serve, spawn, steer


CHECKS = "repositories commits pull_requests refs search downloads access faults collections".split()


def ask(hub, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    """Status and body of one request."""
    connection = HTTPConnection(hub.endpoint.removeprefix("http://"), timeout=20)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


@pytest.mark.parametrize("mode", ["regular", "lfs"])
def test_client(mode, tmp_path):
    """Everything of `hub_client`, with the server in a process of its own."""
    with spawn("--mode", mode) as address:
        command = [sys.executable, "-W", "error::UserWarning", "-m", "tests.library.hub_client", mode]
        environment = client_environment(address, tmp_path)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr[-4000:]
        assert done.stdout.split()[1:] == [f"check_{name}" for name in CHECKS]
        uploads = [line for line in steer(address, "requests") if line.startswith("PUT /_lfs/")]
        assert bool(uploads) == (mode == "lfs")
        with pytest.raises(ValueError, match="store: ValueError.*not one of add_folder"):
            steer(address, "store")
    with pytest.raises(OSError):
        steer(address, "requests")


def test_folder(tmp_path):
    """An existing folder as repositories, of which a private one wants a token."""
    for path in ("ann/open/main/x", "ann/open/v2/sub/y", "ann/private-one/main/x"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    with serve(tmp_path) as hub:
        assert hub.files("ann/open") == ["x"] and hub.files("ann/open", "v2") == ["sub/y"]
        assert ask(hub, "/ann/open/resolve/v2/sub/y") == (200, b"ann/open/v2/sub/y")
        assert ask(hub, "/ann/open/resolve/v2/sub/y", Range="bytes=-4") == (206, b"ub/y")
        assert ask(hub, "/ann/open/resolve/v2/sub/y", Range="bytes=99-") == (416, b"")
        assert ask(hub, "/ann/private-one/resolve/main/x")[0] == 401
        assert ask(hub, "/ann/private-one/resolve/main/x", Authorization=f"Bearer {TOKEN}")[0] == 200
        assert ask(hub, "/ann/private-one/resolve/main/x", Authorization="Bearer hf_bob")[0] == 404
        assert [exchange.status for exchange in hub.log] == [200, 206, 416, 401, 200, 404]
        assert hub.requests[0] == "GET /ann/open/resolve/v2/sub/y"


def test_a_commit_in_between(tmp_path):
    """A function of the test runs before a request is handled, and may change the Hub."""
    with serve(orgs={"lab": ["alice"]}) as hub:
        first = hub.create("lab/shelf", {"a.txt": "one", "w.safetensors": b"\0"}, gated="auto", likes=2)
        fault = hub.before("*/resolve/*", lambda: hub.commit("lab/shelf", {"a.txt": "two", "w.safetensors": None}))
        owner = {"Authorization": "Bearer hf_alice"}
        assert ask(hub, "/lab/shelf/resolve/main/a.txt", **owner) == (200, b"two")
        assert ask(hub, "/lab/shelf/resolve/main/a.txt", Authorization="Bearer hf_bob")[0] == 403
        assert (fault.hits, hub.files("lab/shelf"), hub.errors) == (1, [".gitattributes", "a.txt"], [])
        assert ask(hub, f"/lab/shelf/raw/{first}/w.safetensors", **owner)[1].startswith(b"version https://git-lfs")
        assert hub.read("lab/shelf", "a.txt", first) == b"one"
        with pytest.raises(ValueError, match="stars: not a setting"):
            hub.set("lab/shelf", stars=1)


def test_stopping_closes_connections():
    """A client that kept its connection sees that the Hub is gone."""
    hub = serve()
    connection = HTTPConnection(hub.endpoint.removeprefix("http://"), timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", "/api/models")
        assert connection.getresponse().read() == b"[]"
        hub.stop()
        with pytest.raises((RemoteDisconnected, ConnectionError)):
            connection.request("GET", "/api/models")
            connection.getresponse()


def test_pages():
    """A listing longer than a page links to the next one."""
    with serve() as hub:
        hub.store.page_size = 2
        for number in range(5):
            hub.create(f"alice/m{number}", {"README.md": "---\ntags: [t]\n---\n"})
        found, path = [], "/api/models?filter=t"
        while path:
            connection = HTTPConnection(hub.endpoint.removeprefix("http://"), timeout=20)
            with contextlib.closing(connection):
                connection.request("GET", path)
                answer = connection.getresponse()
                found.append([model["id"] for model in json.loads(answer.read())])
            path = (answer.getheader("Link") or "").removeprefix(f"<{hub.endpoint}").partition(">")[0]
        assert found == [["alice/m0", "alice/m1"], ["alice/m2", "alice/m3"], ["alice/m4"]]


def test_threads():
    """Requests at the same time are each answered, and a fault for two of them hits two."""
    with serve() as hub:
        hub.fail("/api/models", status=500, times=2)
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(ask(hub, "/api/models")[0])) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(answers) == [200] * 6 + [500] * 2 and len(hub.requests) == 8
