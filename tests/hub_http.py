"""The HTTP of the test Hub: one request in, faults applied, one answer out."""

from __future__ import annotations

import json
import sys
import time
import traceback
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import tests.hub_collections
import tests.hub_files  # noqa: F401  (registers its routes, as the line above does)
from tests.hub_faults import Fault
from tests.hub_routes import Answer, Call, as_json, dispatch
from tests.hub_store import HubError


STEERING = "/_test/"


@dataclass
class Exchange:
    """A request that was answered; `sent` counts the bytes of the body, `status` is 0 where there was no answer."""

    method: str
    path: str
    query: str
    user: str | None
    status: int
    sent: int


class Server(ThreadingHTTPServer):
    """Remembers its connections, to close them when it stops, and what went wrong in it."""

    def __init__(self, hub, port: int = 0):
        self.hub, self.connections = hub, set()
        super().__init__(("127.0.0.1", port), Handler)

    def handle_error(self, request, client_address):
        """Remember it, unless only the client went away."""
        error = sys.exception()
        if not isinstance(error, ConnectionError):
            self.hub.errors.append("".join(traceback.format_exception(error)))


class Handler(BaseHTTPRequestHandler):
    """Answers for the hub of its server."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def setup(self):
        """Remember the connection."""
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self):
        """Forget the connection."""
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, *args):
        """Quiet."""

    def do_GET(self):
        """Every method is answered alike."""
        hub, body, place = self.server.hub, self.read_body(), urlsplit(self.path)
        path = unquote(place.path)
        if path.startswith(STEERING):
            return self.send(self.steered(path.removeprefix(STEERING), json.loads(body or b"{}")))
        hub.requests.append(f"{self.command} {path}")
        call = Call(hub.store, hub.endpoint, self.command, place.path, parse_qs(place.query), self.headers, body)
        answer, cut = self.answer(call, path)
        limit = cut.after_bytes if cut else None
        sent = 0 if answer is None or self.command == "HEAD" else len(answer.body[:limit])
        hub.log.append(Exchange(self.command, path, place.query, call.user, answer.status if answer else 0, sent))
        if answer is None:
            self.close_connection = True
        else:
            self.send(answer, limit)

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def steered(self, name: str, call: dict) -> Answer:
        """What a test in another process wants of the hub."""
        try:
            return as_json({"value": self.server.hub.steer(name, call)})
        except (HubError, KeyError, TypeError, ValueError) as error:
            return as_json({"error": f"{name}: {error!r}"})

    def read_body(self) -> bytes:
        """What the client sent, of a known length or in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, call: Call, path: str) -> tuple[Answer | None, Fault | None]:
        """The answer, None to close the connection instead, and where to cut it off."""
        faults, method = self.server.hub.faults, self.command
        if fault := faults.take("call", method, path):
            fault.function()
        if fault := faults.take("delay", method, path):
            time.sleep(fault.seconds)
        if faults.take("drop", method, path):
            return None, None
        if fault := faults.take("fail", method, path):
            return refusal(HubError(fault.status, fault.message, headers=fault.headers)), None
        answer = self.handled(call)
        if method == "HEAD" or not answer.body or answer.status >= 300:
            return answer, None
        if fault := faults.take("corrupt", method, path):
            at = min(fault.after_bytes, len(answer.body) - 1)
            answer.body = answer.body[:at] + bytes([answer.body[at] ^ 0xFF]) + answer.body[at + 1 :]
        return answer, faults.take("cut", method, path)

    def handled(self, call: Call) -> Answer:
        """What the Hub answers when nothing is wrong with it."""
        try:
            with call.store.lock:
                return dispatch(call)
        except HubError as error:
            return refusal(error)
        except (KeyError, TypeError, ValueError) as error:
            self.server.hub.errors.append(f"{call.method} {call.path}: {error!r}")
            return refusal(HubError(400, f"the test Hub cannot read this request: {error!r}"))

    def send(self, answer: Answer, limit: int | None = None):
        """Status, headers and body; with a limit, only so many bytes of it, and the connection is closed."""
        self.send_response(answer.status)
        length = {"Content-Length": str(len(answer.body))}
        for name, value in {"Content-Type": "application/json", **length, **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[:limit])
        self.wfile.flush()
        if limit is not None:
            self.close_connection = True


def refusal(error: HubError) -> Answer:
    """An error as the Hub sends it."""
    message = error.message.replace("\n", " ").encode("ascii", "replace").decode()
    code = {"X-Error-Code": error.code} if error.code else {}
    return as_json({"error": error.message}, error.status, **{"X-Error-Message": message, **code, **error.headers})
