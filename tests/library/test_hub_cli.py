"""`peft-arrow pull`, `push` and `discover` against a Hub."""

from __future__ import annotations

import pytest

from peft_arrow import AdapterLibrary
from tests.hub_server import serve
from tests.library.hub_runs import add_base, make_adapters, run_client


CHECKS = (
    *("push", "push_refused", "pull", "pull_refused", "the_hub_is_gone"),
    *("discover", "discover_filters", "discover_downloads_little", "discover_texts"),
)


@pytest.mark.slow
def test_commands(tmp_path):
    """Everything of `cli_client`."""
    folders = make_adapters(tmp_path / "adapters")
    AdapterLibrary.from_pretrained(list(folders.values())).save_pretrained(tmp_path / "library")
    with serve(orgs={"lab": ["alice"]}) as hub:
        add_base(hub, tmp_path / "base")
        passed = run_client("cli_client", hub.endpoint, tmp_path / "home", tmp_path)
        assert tuple(passed) == CHECKS and hub.errors == []
