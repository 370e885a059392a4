"""Faults that a test orders from the test Hub: refusals, cut or damaged answers, delays, and calls in between."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase


@dataclass
class Fault:
    """What to do with requests whose path matches `pattern`, a shell pattern in which `*` matches slashes too.

    `skip` requests pass first, then `times` are hit (None: all of them); `hits` counts those.
    """

    action: str
    pattern: str
    method: str | None = None
    times: int | None = 1
    skip: int = 0
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "a fault ordered by the test"
    after_bytes: int = 0
    seconds: float = 0.0
    function: Callable[[], object] | None = None
    hits: int = 0

    def matches(self, method: str, path: str) -> bool:
        """Whether a request is one that the fault is about, spent or not."""
        return self.method in (None, method) and fnmatchcase(path, self.pattern)

    def take(self) -> bool:
        """Count a matching request; whether it is hit."""
        if self.skip:
            self.skip -= 1
            return False
        if self.times is not None and self.hits >= self.times:
            return False
        self.hits += 1
        return True

    def summary(self) -> dict:
        """Its fields as JSON allows them."""
        return {key: value for key, value in vars(self).items() if key != "function"}


class Faults:
    """The faults ordered so far, for use from every thread of the server."""

    def __init__(self):
        self.lock = threading.Lock()
        self.ordered: list[Fault] = []

    def add(self, fault: Fault) -> Fault:
        """Order one."""
        with self.lock:
            self.ordered.append(fault)
        return fault

    def clear(self):
        """Forget all."""
        with self.lock:
            self.ordered.clear()

    def take(self, action: str, method: str, path: str) -> Fault | None:
        """The first fault of a kind that hits a request, counted."""
        with self.lock:
            matching = [f for f in self.ordered if f.action == action and f.matches(method, path)]
            return next((fault for fault in matching if fault.take()), None)
