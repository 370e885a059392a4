"""Refusals, a busy Hub, lost connections, damaged files: what is tried again, and what the error says."""

from __future__ import annotations

import pytest

from peft_arrow import AdapterLibrary
from peft_arrow.library import retrying
from tests.hub_server import serve
from tests.library.hub_runs import make_adapters, run_client


CHECKS = (
    *("refusals", "no_weights", "busy_while_reading", "busy_while_pushing", "busy_for_long", "cut"),
    *("connections_that_are_lost_for_long", "corrupt_weights", "corrupt_configs", "late_answers", "names"),
)


@pytest.mark.slow
def test_faults(tmp_path):
    """Everything of `fault_client`."""
    folders = make_adapters(tmp_path / "adapters")
    AdapterLibrary.from_pretrained(list(folders.values())).save_pretrained(tmp_path / "library")
    settings = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
    with serve() as hub:
        passed = run_client("fault_client", hub.endpoint, tmp_path / "home", tmp_path, **settings)
        assert tuple(passed) == CHECKS and hub.errors == []


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "0"}, None),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        ({"Retry-After": "99999999999999999999"}, None),
        ({}, None),
    ],
)
def test_the_time_to_wait(headers, seconds):
    """Seconds are taken from the headers; where they say none that is sensible, 1, 2, 4 and 8 are waited."""
    assert (retrying._asked_for(headers) or None) == seconds
