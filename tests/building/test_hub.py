"""From data sets, adapters and a base on the Hub to a library on the Hub, and what is told where the Hub fails."""

from __future__ import annotations

import json

import pytest

from tests.building.data import TASKS
from tests.hub_server import serve
from tests.library.hub_runs import add_base, files_of, make_adapters, run_client


CHECKS = (
    *("build_and_push", "what_is_known_before_the_training", "a_push_that_fails_keeps_the_library"),
    *("a_hub_that_is_away_at_first", "a_lost_data_set", "a_lost_base", "the_revision_of_the_base"),
    *("clusters_of_adapters_on_the_hub", "a_lost_adapter"),
)


@pytest.mark.slow
def test_pipelines(tmp_path):
    """Everything of `hub_client`."""
    folders = make_adapters(tmp_path / "adapters")
    with serve() as hub:
        add_base(hub, tmp_path / "base")
        for name in ("alice/lost-base", "alice/versions"):
            hub.create(name, files_of(tmp_path / "base"))
        for name in (*TASKS, "lost"):
            rows = TASKS.get(name, TASKS["task0"])
            hub.create(f"alice/{name}", {"train.jsonl": "\n".join(map(json.dumps, rows))}, repo_type="dataset")
        for name, folder in folders.items():
            hub.create(f"alice/{name}", files_of(folder))
        hub.create("alice/lost-adapter", files_of(folders["sql"]))
        hub.create("alice/public", {"a.txt": "x"})
        passed = run_client("tests.building.hub_client", hub.endpoint, tmp_path / "home", tmp_path)
        assert tuple(passed) == CHECKS and hub.errors == []
