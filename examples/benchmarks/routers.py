"""Every router on a library of task experts: the judge's table, and how often each picks the task's own expert.

    accelerate launch examples/benchmarks/routers.py tasks/*.jsonl --output judged --train-only   # several processes
    python examples/benchmarks/routers.py tasks/*.jsonl --output judged                           # an hour, two cores
    python examples/benchmarks/routers.py tasks/*.jsonl --output judged --methods arrow spectr    # some of them first
    python examples/benchmarks/routers.py --smoke                                                 # a pico base

Each file is a task: rows of `instruction`, `input` and `output`, with a `split` of "train" or "eval" and perhaps
`options`. One adapter a task is trained as in the quickstart. Then `evaluate_library` judges every router and control
on eval rows; routers that need data are fitted on train rows. Everything is kept in --output: an interrupted run goes
on, and a second process may judge other methods at the same time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from library_kinds import read_rows

from peft_arrow import ROUTERS, AdapterLibrary, ArrowLoraModel, evaluate_library, train_library
from peft_arrow.prompts import instruction_prompt
from peft_arrow.quickstart.base import load_base, silence_known_warnings
from peft_arrow.training.recipe import WARMUP


METHODS: dict[str, Any] = {
    "arrow": "arrow",
    "arrow_calibrated": {"router": "arrow", "calibrated": True},
    "arrow_sequence": {"router": "arrow", "granularity": "sequence"},
    "arrow_calibrated_sequence": {"router": "arrow", "calibrated": True, "granularity": "sequence"},
    "arrow_tied": {"router": "arrow", "tied": True},
    "arrow_calibrated_null": {"router": "arrow", "calibrated": True, "null_expert": 0.0},
    "spectr": "spectr",
    "spectr_calibrated": {"router": "spectr", "calibrated": True},
    "norm": "norm",
    "norm_calibrated": {"router": "norm", "calibrated": True},
    "lag": {"router": "lag", "filter_k": 4, "top_k": 1},
    "centroid": "centroid",
    "task_predictor": {"router": "task_predictor", "top_k": 1},
    "retrieval": {"router": "retrieval", "top_k": 3, "router_temperature": 0.2},
    "phatgoose": {"router": "phatgoose", "top_k": 2},
    "uniform_parameter": "uniform_parameter",
}
NOT_ROUTED = ("uniform_parameter",)


def library_of(args: argparse.Namespace, base: torch.nn.Module, tokenizer: Any, root: Path) -> AdapterLibrary:
    """One expert a task, trained now if it is not there."""
    return train_library(
        base,
        {path.stem: path for path in args.files},
        kind="private",
        output_dir=root / "library",
        tokenizer=tokenizer,
        steps=args.steps,
        init_seed=0,
        sft_config={
            "learning_rate": args.lr,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "max_grad_norm": 1.0,
            WARMUP: 0,
            "max_length": 256,
            "seed": 0,
            "save_steps": 20,
        },
        lora_config={"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"},
    )


@torch.no_grad()
def pick_rates(
    args: argparse.Namespace,
    base: torch.nn.Module,
    tokenizer: Any,
    library: AdapterLibrary,
    methods: Mapping[str, Any],
    fit_data: Mapping[str, list],
    file: Path,
) -> None:
    """How often the expert with the largest weight is the task's own, over tokens and modules, with prompts alone.

    Prints each, and keeps it in `file`; what is there is not measured again.
    """
    model = ArrowLoraModel.from_pretrained(base, library, top_k=args.top_k)
    for name, method in methods.items():
        known = json.loads(file.read_text()) if file.exists() else {}
        if name in known:
            print(f"{name:<28}{known[name]['mean']:.3f}")
            continue
        options = dict(method) if isinstance(method, dict) else {"router": method}
        router, is_calibrated = options.pop("router"), options.pop("calibrated", False)
        start = time.perf_counter()
        plain = {"granularity": "token", "tied": False, "null_expert": None, "router_temperature": 1.0}
        if ROUTERS[router].needs_data:
            model.fit_router(router, fit_data, tokenizer=tokenizer)
        model.set_router(router, **{**plain, "top_k": args.top_k, "calibrated": False, **options})
        if is_calibrated:
            model.calibrate_router()
        prepared = time.perf_counter() - start
        rates = {}
        with model.trace_routing() as trace:
            for path in args.files:
                trace.tasks = [path.stem]
                for row in read_rows(path, "eval")[: args.traced]:
                    asked = instruction_prompt(row["instruction"], row.get("input"))
                    model(**tokenizer(asked, return_tensors="pt"))
        rates = {task: round(found.top, 4) for task, found in trace.agreement(by="task").items()}
        mean = round(sum(rates.values()) / len(rates), 4)
        known[name] = {"mean": mean, "tasks": rates, "prepared_seconds": round(prepared, 1)}
        file.write_text(json.dumps(known, indent=1))
        print(f"{name:<28}{mean:.3f}   (chance {1 / len(library):.3f})   prepared in {prepared:.1f} s", flush=True)
    model.unload()


def made_up_tasks(root: Path) -> list[Path]:
    """Three tasks, one with options, for --smoke."""
    answers = {"plurals": "{}s", "upper": "{0}!", "sign": "yes"}
    for task, answer in answers.items():
        rows = [
            {
                "instruction": f"{task}:",
                "input": f"word{place}",
                "output": answer.format(f"word{place}"),
                "split": "train" if place < 8 else "eval",
                **({"options": ["yes", "no"]} if task == "sign" else {}),
            }
            for place in range(12)
        ]
        (root / f"{task}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return [root / f"{task}.jsonl" for task in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="one .jsonl file a task")
    parser.add_argument("--base", help="folder or Hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--steps", type=int, default=40, help="of each adapter (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=20, help="eval rows a task (default: %(default)s)")
    parser.add_argument("--traced", type=int, default=4, help="prompts a task for the rates (default: %(default)s)")
    parser.add_argument(
        "--fit-rows", type=int, default=32, help="train rows a task to fit with (default: %(default)s)"
    )
    parser.add_argument("--top-k", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=24, help="default: %(default)s")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS], help="default: all")
    parser.add_argument("--train-only", action="store_true", help="train the adapters and stop")
    parser.add_argument("--no-judge", dest="judge", action="store_false", help="only the rates")
    parser.add_argument("--no-rates", dest="rates", action="store_false", help="only the judge")
    parser.add_argument("--output", type=Path, help="keeps everything (default: a temporary folder)")
    parser.add_argument("--smoke", action="store_true", help="a pico base, made-up tasks, few steps")
    args = parser.parse_args()
    if not args.files and not args.smoke:
        parser.error("name one file a task, or pass --smoke")
    silence_known_warnings()
    with tempfile.TemporaryDirectory() as temporary:
        root = args.output or Path(temporary) / "judged"
        root.mkdir(parents=True, exist_ok=True)
        if args.smoke:
            from tests.building.data import base_in

            args.files, args.base = made_up_tasks(Path(temporary)), base_in(Path(temporary))
            args.steps, args.rows, args.traced, args.max_new_tokens, args.top_k = 2, 3, 1, 4, 2
            args.methods = ["arrow", "arrow_calibrated", "lag", "task_predictor"]
        run(args, root)


def run(args: argparse.Namespace, root: Path) -> None:
    """Train, judge, and print."""
    base, tokenizer = load_base(args.base)
    library = library_of(args, base, tokenizer, root)
    if args.train_only:
        return
    base.requires_grad_(False)
    fit_data = {path.stem: read_rows(path, "train")[: args.fit_rows] for path in args.files}
    methods = {name: METHODS[name] for name in args.methods}
    if args.rates:
        routed = {name: method for name, method in methods.items() if name not in NOT_ROUTED}
        pick_rates(args, base, tokenizer, library, routed, fit_data, root / "rates.json")
    if args.judge:
        named = [method if isinstance(method, str) else {**method, "name": name} for name, method in methods.items()]
        report = evaluate_library(
            base,
            library,
            args.files,
            methods=named,
            tokenizer=tokenizer,
            output_dir=root / "report",
            fit_data=fit_data,
            max_rows=args.rows,
            selection_rows=8,
            top_k=args.top_k,
            max_new_tokens=args.max_new_tokens,
            overwrite=True,
        )
        print(report.table())


if __name__ == "__main__":
    main()
