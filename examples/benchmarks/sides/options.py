"""The options that the benchmarks share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from peft_arrow.ops import KERNELS
from peft_arrow.quickstart.base import silence_known_warnings

from .bases import PICO
from .experts import Experts, random_experts, trained_experts
from .side import BASE, MTTL, OURS, PEFT, PLAIN, XLORA, Request


def shared_options(doc: str, experts: list[int]) -> argparse.ArgumentParser:
    """A parser with the options of all benchmarks; `experts` is the default of --experts."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="+", default=experts, help="default: %(default)s")
    parser.add_argument("--rank", type=int, default=8, help="of random experts (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=4, help="experts a token (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of torch (default: as OMP_NUM_THREADS or the cores say)")
    parser.add_argument("--base", help="folder, Hub id, 'pico' or 'random-7b' (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--routing",
        nargs="+",
        choices=["random", "trained"],
        help="random factors and tokens; or trained adapters and a text (default: random, with --adapters both)",
    )
    parser.add_argument(
        "--adapters", type=Path, nargs="+", default=[], help="folders of trained adapters or libraries"
    )
    parser.add_argument("--noise", type=float, default=0.3, help="of their copies, relative (default: %(default)s)")
    parser.add_argument("--sides", nargs="+", default=[], help="only these beside base, plain LoRA and ours auto")
    parser.add_argument("--peer-bytes", type=float, help="GiB that another side may take (default: 80 %% of the free)")
    parser.add_argument("--xlora-experts", type=int, default=32, help="most for X-LoRA (default: %(default)s)")
    parser.add_argument(
        "--slow", type=float, default=60, help="seconds; a slower side runs once (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="folder for a JSON file and a plot (default: none written)")
    parser.add_argument("--smoke", action="store_true", help="a pico base and small sizes, to see that it runs")
    return parser


def settle(args: argparse.Namespace, **smoke: object) -> argparse.Namespace:
    """Fill in what follows from other options; with --smoke, the values of `smoke`."""
    if args.smoke:
        vars(args).update({"base": PICO, "repeats": 2, "experts": [6], **smoke})
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    silence_known_warnings()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.device, args.dtype = torch.device(args.device), getattr(torch, args.dtype)
    args.routing = args.routing or ["random", *(["trained"] if args.adapters else [])]
    known = (BASE, PLAIN, OURS, PEFT, MTTL, XLORA, *(f"ours {name}" for name in KERNELS))
    unknown = [name for name in args.sides if name not in known]
    if unknown:
        raise SystemExit(f"--sides {unknown[0]!r} is unknown; allowed are {', '.join(map(repr, known))}.")
    if "trained" in args.routing and not args.adapters:
        raise SystemExit("--routing trained needs --adapters, folders of trained adapters.")
    return args


def experts_of(args: argparse.Namespace, routing: str, count: int) -> Experts:
    """The experts that the options ask for."""
    if routing == "random":
        return random_experts(count, args.rank)
    return trained_experts(count, args.adapters, args.noise)


def request_of(args: argparse.Namespace) -> Request:
    """The sides that the options ask for."""
    peer_bytes = None if args.peer_bytes is None else int(args.peer_bytes * 2**30)
    return Request(args.top_k, tuple(args.sides), peer_bytes, args.xlora_experts)


# What the targets are stated for: tokens of a forward.
LENGTHS = {"prefill": 512, "memory": 512, "decode": 1, "train": 2 * 128}


def is_issue_setting(args: argparse.Namespace, work: str, tokens: int) -> bool:
    """Whether a target is stated for this: SmolLM2 in float32 on a CPU, rank 8, four experts a token, its length."""
    is_model = args.base is None and args.device.type == "cpu" and args.dtype == torch.float32
    return is_model and (args.rank, args.top_k) == (8, 4) and tokens == LENGTHS[work]
