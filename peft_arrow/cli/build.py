"""`peft-arrow build`."""

import argparse
import os
import shlex
import sys

from huggingface_hub import CommitInfo

from ..library.hub import check_public_base, check_push
from ..library.library import AdapterLibrary
from ..library.reading import HUB_ERRORS
from .library_config import with_config
from .library_options import add_library_options, tell, train_from


SUMMARY = "Build a library from data sets: private adapters, their clusters, an expert for each cluster; and push it."
EXAMPLE = """examples:
  peft-arrow build --base my/base --data tasks/ --kind mbc --clusters 10 --output library
  peft-arrow build --config build.yaml --output library --push me/my-library
  accelerate launch --num_processes 4 -m peft_arrow.cli build --config build.yaml

The YAML file has the same names (base, data, kind, clusters, steps ...), and sft_config and lora_config with fields of
TRL's and PEFT's own configs; what is given on the command line wins. The work is kept in <output>-training: an
interrupted build continues where it stopped when the command is repeated, and no expert is trained twice."""
DEFAULT_KIND = "mbc"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_library_options(parser, DEFAULT_KIND)
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same names")
    parser.add_argument("--push", metavar="REPO", help="user/repo to upload the library to, made if it does not exist")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--token", help="Hub token that may write (default: the one you are logged in with)")


def run(arguments: argparse.Namespace) -> None:
    """Build with parsed arguments."""
    arguments, sections = with_config(arguments, add_arguments)
    is_main = os.environ.get("RANK", "0") == "0"
    if arguments.private and not arguments.push:
        raise ValueError("--private is for --push.")
    if arguments.push and is_main:
        _check(arguments)
    library, failures = train_from(arguments, sections, DEFAULT_KIND)
    pushed, reason = None, None
    if arguments.push and is_main and failures:
        reason = "some experts failed"
    elif arguments.push and is_main:
        pushed, reason = _push(arguments, library)
    tell(arguments, library, failures, pushed.commit_url if pushed else None, reason)


def _check(arguments: argparse.Namespace) -> None:
    """What can be known of the push before the training; a Hub that is away now may be back at its end."""
    if arguments.base:
        check_public_base(arguments.base, "give --base its Hub id, or build without --push and push later.")
    try:
        check_push(arguments.push, private=arguments.private, token=arguments.token)
    except ConnectionError as error:
        print(f"peft-arrow build: {error}; the library is built all the same, and pushed then.", file=sys.stderr)


def _push(arguments: argparse.Namespace, library: AdapterLibrary) -> tuple[CommitInfo | None, str | None]:
    """The commit, or why there is none and how to push later."""
    try:
        return library.push_to_hub(arguments.push, private=arguments.private, token=arguments.token), None
    except (ValueError, *HUB_ERRORS) as error:
        words = ["peft-arrow", "push", arguments.output, arguments.push, *(["--private"] if arguments.private else [])]
        return None, f"{' '.join(str(error).split())}\nPush it later: {shlex.join(words)}"
