"""`peft-arrow cluster`."""

import argparse
import json

from ..library.library import AdapterLibrary


SUMMARY = "Group adapters by what their weights do, and merge each group into one expert; no data is needed."
EXAMPLE = """examples:
  peft-arrow cluster alice/lora-sql bob/lora-dates ./my-loras/* --clusters auto
  peft-arrow cluster me/my-library --clusters 10 --plots pictures
  peft-arrow cluster me/my-library --clusters 10 --merge --output smaller && peft-arrow push smaller me/smaller

Adapters may differ in rank, alpha and author; --embedding paper needs equal shapes and one initialisation."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("refs", nargs="+", metavar="REF", help="folder or Hub id of an adapter or a library")
    parser.add_argument(
        "--clusters", type=count_or_auto, default="auto", help="how many, or auto: by the silhouette (default: auto)"
    )
    parser.add_argument("--embedding", choices=("delta", "paper"), default="delta", help="default: %(default)s")
    parser.add_argument("--grouping", choices=("average", "spectral"), default="average", help="default: %(default)s")
    parser.add_argument("--layers", type=int, nargs="+", metavar="N", help="compare these layers only")
    parser.add_argument("--modules", nargs="+", metavar="NAME", help="compare these modules only, such as o_proj")
    parser.add_argument("--seed", type=int, default=42, help="default: %(default)s")
    parser.add_argument("--merge", action="store_true", help="write one merged expert a cluster to --output")
    parser.add_argument("--rank", type=int, help="of the merged experts (default: its largest member's)")
    parser.add_argument("--output", help="a new or empty folder, or that of a library, which is replaced")
    parser.add_argument("--plots", metavar="FOLDER", help="draw the similarities, a map and the tree")
    parser.add_argument("--base", help="the base model, where the adapters name none or different ones")
    parser.add_argument("--revision", help="branch, tag or commit; @revision in a REF wins")
    parser.add_argument("--token", help="Hub token (default: the one you are logged in with)")
    parser.add_argument("--json", action="store_true", help="print the clusters as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Cluster with parsed arguments."""
    from ..clustering.mbc import MBCClusterer
    from ..clustering.summary import clusters_record, clusters_table

    if arguments.merge != bool(arguments.output) or (arguments.rank is not None and not arguments.merge):
        raise ValueError("--merge and --output go together, and --rank is for --merge.")
    library = AdapterLibrary.from_pretrained(
        arguments.refs, arguments.base, token=arguments.token, revision=arguments.revision
    )
    options = {name: getattr(arguments, name) for name in ("embedding", "grouping", "layers", "modules")}
    clusterer = MBCClusterer(arguments.clusters, random_state=arguments.seed, **options).fit(library)
    if arguments.merge:
        clusterer.merge_experts(arguments.rank).save_pretrained(arguments.output)
    pictures = clusterer.plot(arguments.plots) if arguments.plots else {}
    if arguments.json:
        print(json.dumps({**clusters_record(clusterer), "pictures": {k: str(v) for k, v in pictures.items()}}))
    else:
        print("\n".join([clusters_table(clusterer), *(f"{path} is drawn." for path in pictures.values())]))


def count_or_auto(text: str) -> int | str:
    """A whole number of at least 1, "auto", or argparse's error."""
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number of at least 1 nor auto")
    return int(text)
