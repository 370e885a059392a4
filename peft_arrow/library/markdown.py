"""Text of strangers as Markdown that shows it and does nothing: no markup, link, HTML, line break or hidden character.

Pipes, dollars, brackets and backslashes become HTML entities: renderers look for tables and formulas (`$`, `\\(`)
before they undo backslashes.
"""

from __future__ import annotations

import re
import unicodedata


ELLIPSIS = "\u2026"
_ESCAPES = {
    **{mark: f"&#{ord(mark)};" for mark in "|\\`$@[]"},
    **{mark: f"\\{mark}" for mark in "*_#!~"},
    **{"&": "&amp;", "<": "&lt;", ">": "&gt;"},
}
_LINE_START = re.compile(r"^(\d{1,9}(?=[.)](?: |$))|(?=[-+=:]))")
# GitHub's Markdown makes links of these, and no escape stops all renderers: such words are shown as code.
_LINKED = re.compile(r"://|www\.|mailto:|xmpp:|@", re.IGNORECASE)
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0"
_JOINER = "\u200d"


def plain(text: str, limit: int = 120) -> str:
    """One line without control, zero-width and direction characters, at most `limit` long; emoji stay whole."""
    line = " ".join(text[: 50 * limit].split())
    kept = "".join(mark for position, mark in enumerate(line) if _is_shown(line, position))
    kept = " ".join(kept.split())
    return kept if len(kept) <= limit else kept[: limit - 1].rstrip(f" {_JOINER}") + ELLIPSIS


def _is_shown(line: str, position: int) -> bool:
    mark = line[position]
    if mark == _JOINER:
        before, after = line[position - 1 : position], line[position + 1 : position + 2]
        joins = before == "\ufe0f" or (before and unicodedata.category(before) in ("So", "Sk"))
        return bool(joins and after and unicodedata.category(after) == "So")
    tag_or_selector = 0xE0000 <= ord(mark) <= 0xE0FFF
    return not tag_or_selector and mark not in _BLANK and unicodedata.category(mark) not in _HIDDEN


def inline(text: str, limit: int = 120) -> str:
    """The text as it is on one line, for a paragraph, a list or a table cell; addresses become code, not links."""
    words = [code(word, limit) if _LINKED.search(word) else _escape(word) for word in plain(text, limit).split(" ")]
    return _LINE_START.sub(r"\1\\", " ".join(words))


def _escape(word: str) -> str:
    return "".join(_ESCAPES.get(mark, mark) for mark in word)


def code(text: str, limit: int = 120) -> str:
    """The text as a code span, also in a table cell; a pipe or a backtick stands between two spans."""
    parts = re.split(r"([|`])", plain(text, limit))
    return "".join(_ESCAPES[part] if part in ("|", "`") else f"`{part}`" for part in parts if part)


def paragraphs(text: str, limit: int = 2000) -> str:
    """Plain text of several lines: blank lines part paragraphs, single ones stay line breaks."""
    cut = text if len(text) <= limit else text[: limit - 1] + ELLIPSIS
    blocks: list[list[str]] = [[]]
    for line in cut.splitlines():
        if shown := inline(line, limit):
            blocks[-1].append(shown)
        else:
            blocks.append([])
    return "\n\n".join("\\\n".join(block) for block in blocks if block)


def fenced(text: str, language: str = "", limit: int = 2000) -> str:
    """The text as a code block whose fence is longer than any row of backticks in it."""
    lines = [shown for line in text[:limit].splitlines() if (shown := _code_line(line))]
    if len(text) > limit:
        lines.append(ELLIPSIS)
    longest = max((len(row) for row in re.findall(r"`+", "\n".join(lines))), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([f"{fence}{language}", *lines, fence])


def _code_line(line: str) -> str:
    indent = len(line) - len(line.lstrip(" "))
    shown = plain(line, 2000)
    return " " * min(indent, 40) + shown if shown else ""
