"""`peft-arrow quickstart`."""

import argparse
import contextlib
import json
import sys

from ..quickstart import BuildFailed, JudgeSettings, TrainSettings, run_quickstart
from .cluster import count_or_auto


SUMMARY = "Build a library of adapters for SmolLM2-135M, route it, compare, answer, draw; or route your own adapters."
EXAMPLE = """examples:
  peft-arrow quickstart
  peft-arrow quickstart --tasks plural german_date --steps 10 --output trial
  peft-arrow quickstart --base my/base --adapters user/lora-a ./lora-b --prompts "Translate: cat" "2 + 2 ="

An interrupted run continues where it stopped when the command is repeated."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    train, judge = TrainSettings(), JudgeSettings()
    parser.add_argument(
        "--base", help="folder or Hub id of the base model (default: SmolLM2-135M-Instruct, from PyPI)"
    )
    parser.add_argument("--adapters", nargs="+", help="route these adapters of the base; trains and judges nothing")
    parser.add_argument(
        "--prompts",
        nargs="+",
        type=with_newlines,
        help="what to answer, in the form the adapters know; \\n is a new line (default: a prompt of each task)",
    )
    parser.add_argument("--output", default="quickstart_output", help="folder for all results (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", help="only these tasks (default: all; a wrong name lists them)")
    parser.add_argument(
        "--steps",
        type=at_least_1,
        default=train.steps,
        help="optimizer steps a task: 40 %% for its private adapter, the rest for its cluster's expert (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--clusters",
        type=count_or_auto,
        default=train.clusters,
        metavar="N",
        help="experts of the library, or auto: by the silhouette; at most one a task (default: %(default)s)",
    )
    parser.add_argument("--top-k", type=at_least_1, default=judge.top_k, help="experts a token (default: %(default)s)")
    parser.add_argument(
        "--heldout", type=at_least_1, default=judge.heldout, help="held-out rows a task (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print only the report, as JSON; the rest goes to stderr")


def run(arguments: argparse.Namespace) -> None:
    """Run the quickstart with parsed arguments.

    Raises:
        SystemExit: with code 1 where the library could not be built.
    """
    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        try:
            result = run_quickstart(
                arguments.base,
                arguments.adapters,
                arguments.output,
                tasks=arguments.tasks,
                prompts=arguments.prompts,
                training=TrainSettings(steps=arguments.steps, clusters=arguments.clusters),
                judging=JudgeSettings(heldout=arguments.heldout, top_k=arguments.top_k),
            )
        except BuildFailed as error:
            raise SystemExit(f"peft-arrow quickstart: {error}") from error
    if arguments.json:
        print(json.dumps(result, indent=1, ensure_ascii=False))


def with_newlines(text: str) -> str:
    """A shell does not make new lines of `\\n`; prompts need them."""
    return text.replace("\\n", "\n")


def at_least_1(text: str) -> int:
    """A whole number of at least 1, or argparse's error."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
