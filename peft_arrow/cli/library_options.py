"""What `train` and `build` share: options, their YAML file, and the call of `train_library`."""

import argparse
import json
import os
import shlex
from collections.abc import Mapping
from typing import Any

from ..library.library import AdapterLibrary
from ..quickstart.base import silence_known_warnings
from .library_config import words_of
from .quickstart import at_least_1


KINDS = ("private", "shared", "mbc", "random", "random_examples", "embedding", "poly", "mhr")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULTS = {"clusters": "10", "embedding": "delta", "seed": None}
UNTOLD = ("config", "json", "push", "private", "token", "command")


def add_library_options(parser: argparse.ArgumentParser, default_kind: str) -> None:
    """The options of both commands; None is what was not given."""
    parser.add_argument("--base", help="folder or Hub id of the base model")
    parser.add_argument("--base-revision", metavar="REV", help="branch, tag or commit of the base on the Hub")
    parser.add_argument("--dtype", choices=DTYPES, help="of the base (default: auto, that of its files)")
    parser.add_argument(
        "--data", nargs="+", metavar="DATA", help="a folder with one .jsonl a task, or files, folders and Hub ids"
    )
    parser.add_argument("--output", "--out", help="folder of the library; work is kept beside it in <output>-training")
    parser.add_argument("--kind", choices=KINDS, help=f"what gets an expert (default: {default_kind})")
    parser.add_argument("--clusters", metavar="N", help="clusters, or auto with --kind mbc (default: 10)")
    parser.add_argument("--embedding", choices=("delta", "paper"), help="what mbc compares (default: delta)")
    parser.add_argument("--steps", type=at_least_1, help="optimizer steps a task (default: five epochs)")
    parser.add_argument("--rank", type=at_least_1, help="of the adapters (default: 4)")
    parser.add_argument("--alpha", type=float, help="of the adapters (default: 16)")
    parser.add_argument("--lr", type=float, help="learning rate (default: 1e-4)")
    parser.add_argument(
        "--batch-size", type=at_least_1, help="rows a step on a device (default: 4, four times a step)"
    )
    parser.add_argument("--max-length", type=at_least_1, help="most tokens of a row (default: 2112)")
    parser.add_argument("--seed", type=int, help="of the first A, the training and the partition (default: 42, 42, 0)")
    parser.add_argument("--overwrite", action="store_true", default=None, help="train again what changed since")
    parser.add_argument("--json", action="store_true", default=None, help="print the report as JSON")


def train_from(
    arguments: argparse.Namespace, sections: Mapping[str, dict], default_kind: str
) -> tuple[AdapterLibrary | None, dict[str, str]]:
    """Call `train_library`; returns the library and what failed.

    Raises:
        ValueError: base, data or output is missing, or anything that `train_library` refuses.
    """
    for name in ("base", "data", "output"):
        if getattr(arguments, name) is None:
            raise ValueError(f"--{name} is missing.")
    from ..building import Options, train_library
    from ..training import TrainingFailed

    silence_known_warnings()
    clusters = arguments.clusters or DEFAULTS["clusters"]
    data = arguments.data[0] if len(arguments.data) == 1 else arguments.data
    seeds = {} if arguments.seed is None else {"seed": arguments.seed, "init_seed": arguments.seed}
    try:
        library = train_library(
            arguments.base,
            data,
            kind=arguments.kind or default_kind,
            output_dir=arguments.output,
            n_clusters=int(clusters) if clusters.isdecimal() else clusters,
            steps=arguments.steps,
            options=Options(embedding=arguments.embedding or DEFAULTS["embedding"]),
            sft_config={**_sft(arguments), **sections["sft_config"]},
            base_model_kwargs=_given(arguments, {"base_revision": "revision", "dtype": "dtype"}),
            lora_config={**_given(arguments, {"rank": "r", "alpha": "lora_alpha"}), **sections["lora_config"]},
            overwrite=bool(arguments.overwrite),
            made={"command": command_of(arguments)},
            **seeds,
        )
    except TrainingFailed as error:
        return error.library, error.failures
    return library, {}


def _given(arguments: argparse.Namespace, names: Mapping[str, str]) -> dict[str, Any]:
    values = {field: getattr(arguments, option) for option, field in names.items()}
    return {field: value for field, value in values.items() if value is not None}


def _sft(arguments: argparse.Namespace) -> dict[str, Any]:
    names = {
        "lr": "learning_rate",
        "batch_size": "per_device_train_batch_size",
        "max_length": "max_length",
        "seed": "seed",
    }
    one_pass = {"gradient_accumulation_steps": 1} if arguments.batch_size is not None else {}
    return {**_given(arguments, names), **one_pass}


def command_of(arguments: argparse.Namespace) -> str:
    """The command that makes the same library, options of the YAML file included, without tokens."""
    words = ["peft-arrow", arguments.command]
    for name, value in vars(arguments).items():
        if name not in UNTOLD and value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *words_of(value)]
    return shlex.join(words)


def tell(
    arguments: argparse.Namespace,
    library: AdapterLibrary | None,
    failures: Mapping[str, str],
    pushed: str | None = None,
    not_pushed: str | None = None,
) -> None:
    """Print what was made; of several processes the first one does.

    Args:
        arguments (`argparse.Namespace`): of the command.
        library (`AdapterLibrary`, *optional*): what was made.
        failures (`Mapping[str, str]`): expert -> why it failed.
        pushed (`str`, *optional*): address of the commit.
        not_pushed (`str`, *optional*): why it could not be pushed.

    Raises:
        SystemExit: with code 1 where experts or the push failed, after the reasons.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    made = dict(library.notes.made) if library is not None else {}
    if arguments.json:
        report = {"output": arguments.output, "experts": list(library or ()), "made": made, "failed": dict(failures)}
        print(json.dumps({**report, "pushed": pushed, "not_pushed": not_pushed}, indent=1, ensure_ascii=False))
    else:
        for stage in made.get("stages", ()):
            told = f"{stage['experts']} experts, {stage['steps']:,} steps, {stage['tokens']:,} tokens"
            print(f"stage {stage['stage']}: {told}")
        if library is not None:
            print(f"{len(library)} experts for {library.base_model_name_or_path} are in {arguments.output}.")
        if pushed:
            print(f"Pushed: {pushed}")
    told = []
    if failures:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in failures.items())
        told.append(f"{len(failures)} failed; the same command trains only what is missing:\n{reasons}")
    if not_pushed:
        kept = "Nothing was pushed" if library is None else f"The library is kept in {arguments.output}, not pushed"
        told.append(f"{kept}: {not_pushed}")
    if told:
        raise SystemExit("\n".join(told))
