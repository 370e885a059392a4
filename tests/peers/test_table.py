"""The table in docs/peers.md names tests that exist, and leaves none of this folder out."""

from __future__ import annotations

import ast
import re
from pathlib import Path


HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "peers.md"


def existing() -> set[str]:
    """`file::test` of every test beside this one."""
    return {
        f"tests/peers/{path.name}::{node.name}"
        for path in HERE.glob("test_*.py")
        if path != Path(__file__)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_the_page_names_every_test_here_and_no_other():
    named = set(re.findall(r"`(tests/[\w/]+\.py::\w+)`", PAGE.read_text()))
    assert named == existing()


def test_every_defect_has_a_test():
    """No row marked D or S is without one."""
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith(("| D |", "| S |"))]
    assert len(rows) > 60
    for row in rows:
        assert "::test_" in row[-1], row
