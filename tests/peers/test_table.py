"""The table in docs/peers.md names tests that exist, and leaves none of this folder out."""

from __future__ import annotations

import ast
import re
from pathlib import Path


HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "peers.md"


def existing(folder: Path) -> set[str]:
    """`file::test` of every test of a folder but this one."""
    return {
        f"{path.relative_to(HERE.parents[1])}::{node.name}"
        for path in folder.rglob("test_*.py")
        if path != Path(__file__)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_the_page_names_every_test_here_and_none_that_is_not_there():
    named = set(re.findall(r"`(tests/[\w/]+\.py::\w+)`", PAGE.read_text()))
    assert existing(HERE) <= named <= existing(HERE.parent)


def test_every_defect_has_a_test():
    """No row marked D or S is without one."""
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith(("| D |", "| S |"))]
    assert len(rows) > 60
    for row in rows:
        assert "::test_" in row[-1], row
