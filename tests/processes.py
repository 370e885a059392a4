"""What tests need that start processes of their own."""

from __future__ import annotations

import os
import socket
from pathlib import Path


ROOT = Path(__file__).parent.parent


def environment() -> dict[str, str]:
    """That of this process, with one thread a process, and with this clone's modules."""
    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
