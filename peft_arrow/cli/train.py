"""`peft-arrow train`."""

import argparse

from .library_config import with_config
from .library_options import add_library_options, tell, train_from


SUMMARY = "Train LoRA experts on data sets, one a task unless --kind says otherwise, and save them as a library."
EXAMPLE = """examples:
  peft-arrow train --base my/base --data tasks/ --output library
  peft-arrow train --base my/base --data sql.jsonl user/dates --kind shared --steps 200 --rank 8 --output shared

Rows have prompt and completion, messages, instruction and output, or text; the loss is on completions only.
An interrupted run continues where it stopped when the command is repeated."""
DEFAULT_KIND = "private"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_library_options(parser, DEFAULT_KIND)


def run(arguments: argparse.Namespace) -> None:
    """Train with parsed arguments."""
    arguments, sections = with_config(arguments, add_arguments)
    library, failures = train_from(arguments, sections, DEFAULT_KIND)
    tell(arguments, library, failures)
