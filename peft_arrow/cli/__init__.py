"""The command line: arguments, and one call a command. Exit code 0: done, 2: bad arguments, 1: anything else."""

import argparse
import sys
from collections.abc import Sequence

from ..library.reading import HUB_ERRORS
from . import adapt, build, cluster, discover, evaluate, inspect, pull, push, quickstart, route, train


COMMANDS = {
    "quickstart": quickstart,
    "discover": discover,
    "inspect": inspect,
    "train": train,
    "cluster": cluster,
    "build": build,
    "adapt": adapt,
    "route": route,
    "evaluate": evaluate,
    "pull": pull,
    "push": push,
}


def make_parser() -> argparse.ArgumentParser:
    """The parser with one sub-command per row of `COMMANDS`."""
    parser = argparse.ArgumentParser(
        prog="peft-arrow", description="Route every token to the LoRA adapters that suit it."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.SUMMARY,
            description=command.SUMMARY,
            epilog=command.EXAMPLE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; `argv` without the program's name, by default that of the process. Returns the exit code."""
    arguments = make_parser().parse_args(argv)
    try:
        COMMANDS[arguments.command].run(arguments)
    except (ValueError, TypeError) as error:
        print(f"peft-arrow {arguments.command}: {error}", file=sys.stderr)
        return 2
    except (ImportError, *HUB_ERRORS) as error:
        print(f"peft-arrow {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The same command continues where it stopped.", file=sys.stderr)
        return 1
    return 0
