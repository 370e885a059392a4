"""The replication's own modules are found as its script finds them: beside it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).parents[2] / "examples" / "replication"


@pytest.fixture(autouse=True)
def beside_the_script(monkeypatch):
    """Put the script's folder on the path for one test."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("replicate", "steps", "report")]:
        del sys.modules[name]
