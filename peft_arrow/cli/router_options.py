"""The options of the commands that route: which router, and how it chooses."""

import argparse
from typing import Any


OPTIONS = ("router", "top_k", "router_temperature")


def add_router_options(parser: argparse.ArgumentParser) -> None:
    """Add them; an option that is not given is left to the model."""
    parser.add_argument("--router", metavar="NAME", help="how experts are chosen (a wrong name lists them)")
    parser.add_argument("--top-k", type=int, metavar="K", help="experts a token")
    parser.add_argument("--router-temperature", type=float, metavar="T", help="divides the router logits")


def router_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, as `from_pretrained` and `set_router` take them."""
    return {name: value for name in OPTIONS if (value := getattr(arguments, name)) is not None}
