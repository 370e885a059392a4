"""`peft-arrow pull`."""

import argparse

from ..library.library import AdapterLibrary


SUMMARY = "Take adapters or a library from the Hub, or from folders, and write them as one library."
EXAMPLE = """examples:
  peft-arrow pull me/my-library --output library
  peft-arrow pull alice/lora-sql bob/loras/dates@v2 ./my-lora --output library --base HuggingFaceTB/SmolLM2-135M

The folder is written in one step; an interrupted pull continues where it stopped when the command is repeated."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("refs", nargs="+", metavar="REF", help="folder or Hub id of an adapter or a library")
    parser.add_argument(
        "--output", required=True, help="a new or empty folder, or that of a library, which is replaced"
    )
    parser.add_argument("--base", help="the base model, where the adapters name none or different ones")
    parser.add_argument("--revision", help="branch, tag or commit; @revision in a REF wins")
    parser.add_argument("--token", help="Hub token (default: the one you are logged in with)")
    parser.add_argument("--json", action="store_true", help="print library.json instead of a sentence")


def run(arguments: argparse.Namespace) -> None:
    """Pull with parsed arguments."""
    library = AdapterLibrary.from_pretrained(
        arguments.refs, arguments.base, token=arguments.token, revision=arguments.revision
    )
    manifest = library.save_pretrained(arguments.output)
    if arguments.json:
        print(manifest.to_json(), end="")
    else:
        print(f"{len(library)} experts for {library.base_model_name_or_path} are in {arguments.output}.")
