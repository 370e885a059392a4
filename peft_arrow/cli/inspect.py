"""`peft-arrow inspect`."""

import argparse

from ..library.vetting import NAMED_BASE, vet_adapters


SUMMARY = "Look at adapters before using them: what they are, whether they fit a base model, what speaks against them."
EXAMPLE = """examples:
  peft-arrow inspect my/adapters
  peft-arrow inspect user/lora-a user/library/experts/sql@v2 ./lora-b --base user/base
  peft-arrow inspect user/lora-a --licenses apache-2.0 mit --json

Of the Hub only adapter_config.json, the card and the header of the weights are read, unless --weights is given.
The exit code is 0 when the adapters were looked at, also where some cannot be used: --json has "ok" for each."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "references",
        nargs="+",
        metavar="REF",
        help="folder, folder of adapters, library, or Hub id user/repo[/folder][@revision]",
    )
    parser.add_argument(
        "--base", default=NAMED_BASE, help="folder or Hub id of the base model (default: what the adapters name)"
    )
    parser.add_argument("--licenses", nargs="+", metavar="ID", help="any other licence, or none, is a problem")
    parser.add_argument(
        "--weights",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="read the weights too: NaN, zeros, near-duplicates, outliers (default: those of folders, not of the Hub)",
    )
    parser.add_argument("--token", help="Hub token for the adapters")
    parser.add_argument("--revision", help="branch, tag or commit of the adapters; @revision in a REF wins")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Inspect with parsed arguments."""
    reports = vet_adapters(
        arguments.references,
        arguments.base,
        licenses=arguments.licenses,
        weights=arguments.weights,
        token=arguments.token,
        revision=arguments.revision,
    )
    print(reports.to_json() if arguments.json else reports.table())
