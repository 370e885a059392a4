"""`peft-arrow adapt`."""

import argparse
import json
import os

from ..quickstart.base import silence_known_warnings
from .quickstart import at_least_1


SUMMARY = "Adapt a library of experts to one new task; the result is a plain PEFT LoRA."
EXAMPLE = """examples:
  peft-arrow adapt library --data reviews.jsonl --method mean --output adapted
  peft-arrow adapt me/my-library --base my/base --data reviews.jsonl --method poly --steps 100 --output adapted
  peft-arrow adapt --base my/base --data reviews.jsonl --method scratch --output adapted

Methods: scratch, a fresh LoRA; shared, goes on with a library's one expert; mean and arrow, start from the experts'
mean or as Arrow weights them; poly, tunes weights over the experts and the experts; polyz, the weights alone; lorahub,
searches one weight an expert without gradients. An interrupted run continues when the command is repeated."""
METHODS = ("mean", "poly", "polyz", "lorahub", "scratch", "shared", "arrow")
SFT = {"lr": "learning_rate", "batch_size": "per_device_train_batch_size", "max_length": "max_length", "seed": "seed"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("library", nargs="?", metavar="LIBRARY", help="folder or Hub id of a library")
    parser.add_argument("--base", help="folder or Hub id of the base model (default: the one the library names)")
    parser.add_argument("--dtype", default="auto", help="of the base (default: auto, that of its files)")
    parser.add_argument("--data", required=True, metavar="DATA", help="a file, folder or Hub id with the task's rows")
    parser.add_argument("--method", choices=METHODS, default="mean", help="(default: %(default)s)")
    parser.add_argument("--output", required=True, help="folder of the adapter")
    parser.add_argument("--steps", type=at_least_1, help="optimizer steps (default: five epochs)")
    parser.add_argument("--lr", type=float, help="learning rate (default: 1e-4)")
    parser.add_argument("--batch-size", type=at_least_1, help="rows a step (default: 4, four times a step)")
    parser.add_argument("--max-length", type=at_least_1, help="most tokens of a row (default: 2112)")
    parser.add_argument("--seed", type=int, help="of the training (default: 42)")
    parser.add_argument("--aggregation", choices=("parameter", "output"), help="how mean and arrow add experts up")
    parser.add_argument("--top-k", type=at_least_1, help="experts a token, for arrow (default: 4)")
    parser.add_argument("--rows", type=at_least_1, help="rows that arrow routes and lorahub scores (default: 64)")
    parser.add_argument("--evaluations", type=at_least_1, help="tries of lorahub (default: 30)")
    parser.add_argument("--overwrite", action="store_true", help="adapt again where something changed since")
    parser.add_argument("--json", action="store_true", help="print what was made as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Adapt with parsed arguments."""
    from ..adaptation.adapt import DEFAULTS, adapt
    from ..library.library import AdapterLibrary
    from ..training.record import TrainingRecord

    silence_known_warnings()
    library = None if arguments.library is None else AdapterLibrary.from_pretrained(arguments.library)
    if library is None and arguments.base is None:
        raise ValueError("--base is missing: without a library nothing names it.")
    given = {field: getattr(arguments, option) for option, field in SFT.items()}
    one_pass = {"gradient_accumulation_steps": 1} if arguments.batch_size is not None else {}
    ref = adapt(
        arguments.base or library.base_model_name_or_path,
        library,
        arguments.data,
        method=arguments.method,
        output_dir=arguments.output,
        steps=arguments.steps,
        sft_config={field: value for field, value in given.items() if value is not None} | one_pass,
        base_model_kwargs={"dtype": arguments.dtype},
        overwrite=arguments.overwrite,
        **{key: value for key in DEFAULTS if (value := getattr(arguments, key)) is not None},
    )
    if os.environ.get("RANK", "0") != "0":
        return
    record = TrainingRecord.read(ref.source)
    if arguments.json:
        told = {"output": arguments.output, "method": arguments.method, "steps": record.steps}
        print(json.dumps({**told, "tokens": record.tokens, "losses": record.losses}))
    else:
        print(f"{record.told()}, in {arguments.output}")
