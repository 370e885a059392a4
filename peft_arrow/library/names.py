"""The rule for expert names: what is allowed, what is derived, how doubles are told apart."""

from __future__ import annotations

import re
from collections.abc import Container


NAME_LENGTH = 96
_NAME = re.compile(rf"(?!\.)[\w.\-]{{1,{NAME_LENGTH}}}")


def check_name(name: str) -> str:
    """Return an expert name that keeps the rule; raise a `ValueError` that states the rule otherwise."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"expert name {name!r} is not allowed; a name is 1 to {NAME_LENGTH} characters of letters, digits, '_', "
            "'.' and '-', not starting with a dot."
        )
    return name


def slug(text: str) -> str:
    """The nearest allowed name: other characters become `-`."""
    cleaned = re.sub(r"[^\w.\-]+", "-", text).lstrip(".").strip("-")[:NAME_LENGTH]
    return cleaned or "adapter"


def unique_name(name: str, taken: Container[str]) -> str:
    """`name`, or where it is taken the first free of `name-2`, `name-3`, ..., cut to the allowed length."""
    unique, count = name, 1
    while unique in taken:
        count += 1
        suffix = f"-{count}"
        unique = name[: NAME_LENGTH - len(suffix)] + suffix
    return unique
