"""Regular expressions out of strangers' configs: refused where matching one could take for ever."""

from __future__ import annotations

import re
import re._constants as codes
import re._parser as parser
from collections.abc import Iterator
from typing import Any


LONGEST = 2000
MOST_REPEATS = 6
_REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT)
_FEW = 8


def check_pattern(pattern: str) -> None:
    """Refuse a regular expression that is none, or whose matching may grow beyond measure with the length of a name.

    Python's `re` tries every way to share a name out between repeats. One repeat in another, or a choice in a repeat,
    makes their number exponential; n repeats in a row make it the n-th power of the length.

    Raises:
        ValueError: with the reason.
    """
    if len(pattern) > LONGEST:
        raise ValueError(f"it has {len(pattern)} characters; at most {LONGEST} are matched")
    try:
        tree = parser.parse(pattern)
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"it is no regular expression: {error}") from error
    repeats = list(_repeats(tree))
    for _, body in repeats:
        inner = list(_nodes(body))
        if any(_is_repeat(*node) for node in inner) or any(code is codes.BRANCH for code, _ in inner):
            raise ValueError("it has a repeat or a choice inside a repeat, which can take for ever to match")
    if len(repeats) > MOST_REPEATS:
        raise ValueError(f"it has {len(repeats)} repeats; with more than {MOST_REPEATS} it can take for ever to match")


def _repeats(tree: Any) -> Iterator[tuple[Any, Any]]:
    for code, argument in _nodes(tree):
        if _is_repeat(code, argument):
            yield code, argument[2]


def _is_repeat(code: Any, argument: Any) -> bool:
    return code in _REPEATS and argument[1] > _FEW


def _nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (code, argument) of a parsed expression, depth first; arguments hold subtrees at some depth of tuples."""
    for code, argument in tree:
        yield code, argument
        for subtree in _subtrees(argument):
            yield from _nodes(subtree)


def _subtrees(argument: Any) -> Iterator[Any]:
    if isinstance(argument, parser.SubPattern):
        yield argument
    elif isinstance(argument, (tuple, list)):
        for part in argument:
            yield from _subtrees(part)
