"""Links to the Hub from text of strangers: made only of well-formed ids, everything else is shown as code."""

from __future__ import annotations

import re
from urllib.parse import quote

from .markdown import code


HUB = "https://huggingface.co"
_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.\-]{0,94}[A-Za-z0-9_])?")
_FOLDER = re.compile(r"(?!\.)[\w.\-]{1,96}")


def hub_id(text: str | None) -> str | None:
    """The text where it is a well-formed Hub id `user/repo`, else None. The Hub is not asked."""
    parts = (text or "").split("/")
    is_id = len(parts) == 2 and all(_PART.fullmatch(part) for part in parts)
    return text if is_id and "--" not in text and ".." not in text and not text.endswith(".git") else None


def dataset_id(text: str | None) -> str | None:
    """As `hub_id`; old datasets of the Hub, such as `squad`, have no user."""
    return text if text and (hub_id(text) or hub_id(f"datasets/{text}")) else None


def is_ref(text: str) -> bool:
    """Whether the text is a commit, or a branch or tag of plain characters."""
    return _PART.fullmatch(text) is not None


def last_part(text: str) -> str:
    """The last part of a path or id: what may be shown of a local folder. A web address stays whole."""
    return text if re.match("https?://", text, re.IGNORECASE) else re.split(r"[/\\]", text.rstrip("/\\"))[-1]


def hub_link(source: str, commit: str | None = None, *, kind: str = "") -> str:
    """A Hub reference as a link, at its commit; anything else as code, of a path the last part alone.

    Args:
        source (`str`): `user/repo` or `user/repo/folder`, each also with `@revision`.
        commit (`str`, *optional*): the commit to link to; without it the revision, and without that `main`.
        kind (`str`): `"datasets/"` for a dataset.
    """
    place, _, revision = source.partition("@")
    parts = place.split("/")
    name = dataset_id(place) if kind else hub_id("/".join(parts[:2]))
    folders = [] if kind else parts[2:]
    if name is None or len(source) > 300 or not all(_FOLDER.fullmatch(folder) for folder in folders):
        return code(last_part(source)) or code("?")
    ref = next((ref for ref in (commit, revision) if ref and is_ref(ref)), None)
    label = place if ref is None else f"{place}@{ref[:7] if ref == commit else ref}"
    tree = "/".join(["", "tree", ref or "main", *map(quote, folders)]) if ref or folders else ""
    return f"[{code(label, 320)}]({HUB}/{kind}{name}{tree})"
