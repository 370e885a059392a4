"""SIGKILL at random moments of a save, a pull and a push: afterwards there is the old library or the new one."""

from __future__ import annotations

import pytest

from tests.hub_server import serve
from tests.library.hub_runs import run_client


@pytest.mark.slow
def test_kills(tmp_path):
    """Everything of `kill_runner`: twenty kills each, and what a second run still has to transfer."""
    with serve() as hub:
        passed = run_client("kill_runner", hub.endpoint, tmp_path / "home", tmp_path)
    assert passed == ["save", "pull", "push", "a_pull_goes_on", "a_push_goes_on"]
