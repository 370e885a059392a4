"""Print a pip constraints file with the lowest version of each requirement, for `make test-lowest`."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path


# Each is printed, so the file serves a run with all of them.
EXTRAS = ("train", "adapt", "eval", "lm-eval", "viz", "quickstart")


def lowest_versions(pyproject: dict) -> list[str]:
    """Return `name==version` for each requirement; a package named twice has one lower bound."""
    project = pyproject["project"]
    requirements = [
        *project["dependencies"],
        *(line for extra in EXTRAS for line in project["optional-dependencies"][extra]),
    ]
    found: dict[str, str] = {}
    for requirement in requirements:
        if requirement.startswith("peft-arrow["):
            continue
        match = re.match(r"([\w.-]+)>=([\w.]+)", requirement)
        assert match, f"{requirement!r} has no lower bound"
        name, version = match.groups()
        assert found.setdefault(name, version) == version, f"{name} has two lower bounds"
    return [f"{name}=={version}" for name, version in found.items()]


if __name__ == "__main__":
    print("\n".join(lowest_versions(tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text()))))
