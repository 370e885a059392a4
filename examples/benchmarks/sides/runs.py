"""A benchmark over all routings and numbers of experts, written down after each."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable

from .machine import machine
from .report import told_machine, write
from .setting import Setting, setting_of


def run_all(args: argparse.Namespace, name: str, run: Callable[[Setting, str, int], list[dict]]) -> list[dict]:
    """The rows of `run(setting, routing, count)` for each routing and count; `name` is that of the JSON file."""
    print(told_machine(machine(args.device)))
    setting, rows = setting_of(args), []
    for routing in args.routing:
        for count in args.experts:
            rows += run(setting, routing, count)
            gc.collect()
            write(args.output, name, machine(args.device), vars(args), rows)
    return rows
