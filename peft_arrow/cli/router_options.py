"""How a command line names a router and its options: `arrow:top_k=2,tied=true`."""

import argparse
import json
from typing import Any

from .. import ROUTERS


def router_of(text: str) -> dict[str, Any]:
    """`arrow:top_k=2` as `{"router": "arrow", "top_k": 2}`.

    Raises:
        argparse.ArgumentTypeError: no such router, or an option without a value.
    """
    name, _, rest = text.partition(":")
    if name not in ROUTERS:
        raise argparse.ArgumentTypeError(f"{name!r} is no router; allowed are {', '.join(ROUTERS)}")
    return {"router": name, **options_of(rest)}


def options_of(text: str) -> dict[str, Any]:
    """`top_k=2,tied=true` as a dict; values are read as JSON where they are JSON.

    Raises:
        argparse.ArgumentTypeError: an option without a value.
    """
    return {option: _value(value) for option, value in map(pair_of, text.split(",") if text else ())}


def pair_of(text: str) -> tuple[str, str]:
    """`name=value`; the name may have equals signs, as a task's may.

    Raises:
        argparse.ArgumentTypeError: there is no `=`, or nothing on one side of it.
    """
    name, _, value = text.rpartition("=")
    if not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
