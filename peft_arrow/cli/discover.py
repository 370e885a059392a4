"""`peft-arrow discover`."""

import argparse

from ..library.library import AdapterLibrary
from .quickstart import at_least_1


SUMMARY = "Find adapters of a base model on the Hub, and say which can be used; only configs and headers are read."
EXAMPLE = """examples:
  peft-arrow discover HuggingFaceTB/SmolLM2-135M-Instruct
  peft-arrow discover meta-llama/Llama-3.1-8B --licenses apache-2.0 mit --max-rank 64 --limit 50 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("base", metavar="BASE", help="Hub id of the base model")
    parser.add_argument("--limit", type=at_least_1, default=20, help="adapters at most (default: %(default)s)")
    parser.add_argument("--licenses", nargs="+", help="only these licences, such as apache-2.0 mit")
    parser.add_argument("--max-rank", type=at_least_1, help="only adapters of at most this rank")
    parser.add_argument("--max-size", type=at_least_1, metavar="BYTES", help="only weights of at most so many bytes")
    parser.add_argument("--min-downloads", type=at_least_1, help="only those downloaded so often in the last month")
    parser.add_argument("--author", help="only of this user or organisation")
    parser.add_argument("--aliases", nargs="+", default=(), help="more ids under which adapters name this base")
    parser.add_argument("--token", help="Hub token (default: the one you are logged in with)")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Discover with parsed arguments."""
    reports = AdapterLibrary.discover(
        arguments.base,
        limit=arguments.limit,
        licenses=arguments.licenses,
        max_rank=arguments.max_rank,
        max_size=arguments.max_size,
        min_downloads=arguments.min_downloads,
        author=arguments.author,
        aliases=arguments.aliases,
        token=arguments.token,
    )
    print(reports.to_json() if arguments.json else reports.table())
