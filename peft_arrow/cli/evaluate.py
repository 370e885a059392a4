"""`peft-arrow evaluate`."""

import argparse
from pathlib import Path
from typing import Any

from ..quickstart.base import silence_known_warnings
from .quickstart import at_least_1
from .router_options import options_of, pair_of


SUMMARY = "Judge ways to use a library of experts on tasks, beside controls, and say what to look at."
EXAMPLE = """examples:
  peft-arrow evaluate library --tasks tasks/*.jsonl --output judged
  peft-arrow evaluate small big --base my/base --tasks tasks/ --methods arrow spectr arrow:top_k=1 --output judged
  peft-arrow evaluate library --tasks tasks/ --methods arrow:calibrated=true,name=calibrated centroid --output judged

Rows have prompt and completion, messages, instruction and output, or options and gold; those whose split is train are
not judged: they choose the best single expert, and fit the routers that need data unless --fit-data is given.
Always judged too: base, uniform, random, random_lora, best_single, oracle. An interrupted run continues where it
stopped when the command is repeated."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("libraries", nargs="+", metavar="LIBRARY", help="folder or Hub id of a library")
    parser.add_argument("--base", help="folder or Hub id of the base model (default: the one the library names)")
    parser.add_argument("--dtype", default="auto", help="of the base (default: auto, that of its files)")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="FILE", help=".jsonl files, or folders of them")
    parser.add_argument(
        "--methods",
        nargs="+",
        type=method_of,
        default=["arrow"],
        metavar="METHOD",
        help="routers, with options as arrow:top_k=2,tied=true",
    )
    parser.add_argument(
        "--oracle",
        nargs="+",
        type=pair_of,
        default=[],
        metavar="TASK=EXPERT",
        help="a task's own expert (default: of its name)",
    )
    parser.add_argument(
        "--fit-data",
        nargs="+",
        metavar="FILE",
        help="<expert>.jsonl, for routers that need data (default: train rows)",
    )
    parser.add_argument("--rows", type=at_least_1, help="judge at most so many rows a task, taken evenly")
    parser.add_argument("--top-k", type=at_least_1, default=4, help="experts a token (default: %(default)s)")
    parser.add_argument("--seeds", type=at_least_1, default=3, help="of random routing (default: %(default)s)")
    parser.add_argument(
        "--max-new-tokens", type=at_least_1, default=64, help="of a generated answer (default: %(default)s)"
    )
    parser.add_argument("--no-generate", dest="generate", action="store_false", help="losses and choices only")
    parser.add_argument("--truncate", action="store_true", help="cut prompts that do not fit on the left")
    parser.add_argument("--output", required=True, help="folder for results, report.json, report.md and report.png")
    parser.add_argument("--overwrite", action="store_true", help="use an output folder that is of something else")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate with parsed arguments."""
    from ..evaluation.command import evaluate_files
    from ..evaluation.pictures import new_figure

    silence_known_warnings()
    new_figure(1, 1)  # a package that is missing for the picture is told now, and not after the work
    report = evaluate_files(
        arguments.libraries,
        arguments.tasks,
        base=arguments.base,
        fit_files=arguments.fit_data,
        methods=arguments.methods,
        oracle=dict(arguments.oracle),
        output_dir=arguments.output,
        base_model_kwargs={"dtype": arguments.dtype},
        overwrite=arguments.overwrite,
        max_rows=arguments.rows,
        top_k=arguments.top_k,
        seeds=arguments.seeds,
        generate=arguments.generate,
        max_new_tokens=arguments.max_new_tokens,
        truncate=arguments.truncate,
    )
    report.plot(Path(arguments.output, "report.png"))
    print(report.to_json() if arguments.json else report.table())


def method_of(text: str) -> str | dict[str, Any]:
    """`arrow` as it is, and `arrow:top_k=2,name=two` as a dict.

    Raises:
        argparse.ArgumentTypeError: an option without a value.
    """
    router, _, rest = text.partition(":")
    return {"router": router, **options_of(rest)} if rest else router
