"""Results in a folder, one file each, so that an interrupted run goes on; never mixed with those of other things."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..library.folders import new_file
from .fingerprints import digest_of


HEADER = "judged.json"
FOLDER = "results"
FORMAT = 1


def write_json(path: Path, value: Any) -> None:
    """Write in one step: after a kill the file is the old one or the new one."""
    with new_file(path) as file:
        file.write(json.dumps(value, ensure_ascii=False).encode())


class ResultStore:
    """The results of a judge, by what they depend on.

    Args:
        folder (`Path`, *optional*): where they are kept; None keeps them in memory only.
        what (`Mapping`): what is judged: the bases, libraries and tasks by name, each with a fingerprint.
        overwrite (`bool`): take over a folder that has something else, whose results are then left alone.

    Raises:
        ValueError: the folder holds a report of another base, other libraries or other rows.
    """

    def __init__(self, folder: Path | None, what: Mapping[str, Mapping[str, str]], overwrite: bool = False) -> None:
        self.folder = folder
        self.kept: dict[str, Any] = {}
        if folder is None:
            return
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"output_dir={str(folder)!r} is a file; it must be a folder.")
        header = folder / HEADER
        if header.exists() and not overwrite:
            _check_same(folder, json.loads(header.read_text(encoding="utf-8")), what)
        write_json(header, {"format": FORMAT, **what})

    def get(self, name: str, key: Mapping[str, Any]) -> Any:
        """The result that was kept under `key`, or None; `name` only helps people to find the file."""
        digest = digest_of({"format": FORMAT, **key})
        path = self._path(name, digest)
        if digest not in self.kept and path is not None and path.exists():
            with contextlib.suppress(json.JSONDecodeError):
                stored = json.loads(path.read_text(encoding="utf-8"))
                if stored.get("key") == json.loads(json.dumps(key, default=str)):
                    self.kept[digest] = stored["value"]
        return self.kept.get(digest)

    def fill(self, name: str, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """The kept result, or that of `compute`, which is then kept."""
        found = self.get(name, key)
        if found is None:
            digest = digest_of({"format": FORMAT, **key})
            found = self.kept[digest] = compute()
            path = self._path(name, digest)
            if path is not None:
                write_json(path, {"key": json.loads(json.dumps(key, default=str)), "value": found})
        return found

    def _path(self, name: str, digest: str) -> Path | None:
        readable = re.sub(r"[^\w.=+-]+", "-", name)[:80].strip(".-")
        return None if self.folder is None else self.folder / FOLDER / f"{readable}-{digest}.json"


def _check_same(folder: Path, stored: Mapping[str, Any], what: Mapping[str, Mapping[str, str]]) -> None:
    if stored.get("format") != FORMAT:
        raise ValueError(
            f"output_dir={str(folder)!r} holds a report of format {stored.get('format')}; this is {FORMAT}."
        )
    for kind, current in what.items():
        before = stored.get(kind, {})
        changed = [name for name in current if before.get(name) != current[name]]
        gone = [name for name in before if name not in current]
        if changed or gone:
            told = f"{kind} {', '.join([*changed, *gone][:4])}"
            raise ValueError(
                f"output_dir={str(folder)!r} holds a report about something else: {told} differ "
                f"(there {list(before)[:6]}, here {list(current)[:6]}). Give another folder, or overwrite=True."
            )
