"""Checked access to JSON of strangers: wrong types, huge numbers and deep nesting become one clear error."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from typing import Any


SIZE_LIMIT = 64 * 2**20
MAX_NUMBER = sys.float_info.max
_KINDS = {str: "a string", int: "a whole number", float: "a number", dict: "an object", list: "a list"}


def parse_json(text: str, where: str) -> dict[str, Any]:
    """A JSON object from a file of a stranger.

    Raises:
        ValueError: not JSON, not an object, nested beyond reason, or with text that is not Unicode.
    """
    if len(text) > SIZE_LIMIT:
        raise ValueError(f"{where} has {len(text)} characters; at most {SIZE_LIMIT} are read.")
    try:
        content = json.loads(text)
        text.encode()
        json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds {type(content).__name__}, not an object.")
    return content


class Fields:
    """Checked access to the fields of a JSON object."""

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        self.content = content
        self.where = where

    def take(self, name: str, kind: type, *, optional: bool = False) -> Any:
        """The field's value, of that kind; None where it is optional and missing."""
        value = self.content.get(name)
        if value is None and optional:
            return None
        is_kind = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        if not is_kind:
            raise ValueError(f"{self.where}: {name} is {short(value)}; it must be {_KINDS[kind]}.")
        if kind is float:
            if not -MAX_NUMBER <= value <= MAX_NUMBER:
                raise ValueError(f"{self.where}: {name} is {short(value)}; it must be a finite number.")
            return float(value)
        return value

    def inner(self, name: str) -> Fields:
        """A field that is an object."""
        return Fields(self.take(name, dict), f"{self.where}: {name}")

    def entries(self, name: str, *, optional: bool = False) -> list[Fields]:
        """A field that is a list of objects."""
        found = []
        for position, entry in enumerate(self.take(name, list, optional=optional) or []):
            where = f"{self.where}: {name}[{position}]"
            if not isinstance(entry, dict):
                raise ValueError(f"{where} is {short(entry)}; it must be an object.")
            found.append(Fields(entry, where))
        return found

    def texts(self, name: str) -> tuple[str, ...]:
        """A field that is a list of strings; missing means empty."""
        values = self.take(name, list, optional=True) or []
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"{self.where}: {name} is {short(values)}; it must be a list of strings.")
        return tuple(values)

    def matching(self, name: str, pattern: re.Pattern, rule: str, *, optional: bool = False) -> str | None:
        """A string field of a certain form."""
        value = self.take(name, str, optional=optional)
        if value is not None and not pattern.fullmatch(value):
            raise ValueError(f"{self.where}: {name} is {short(value)}; it must be {rule}.")
        return value

    def at_least(self, name: str, least: int) -> int:
        """A whole number of at least `least`, and below 2^63."""
        value = self.take(name, int)
        if not least <= value < 2**63:
            raise ValueError(f"{self.where}: {name} is out of range; it must be at least {least} and below 2^63.")
        return value


def short(value: Any) -> str:
    """The value for a message, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
