"""What routing costs in one linear layer, kernel by kernel: the crossovers that `kernel="auto"` is made of.

    python examples/benchmarks/layer.py                              # 576x1536 and 1536x576, many minutes
    python examples/benchmarks/layer.py --sizes 4096x4096 --experts 16 256 --tokens 1 16 256
    python examples/benchmarks/layer.py --adapters my-library --output results   # also trained experts, on a text
    python examples/benchmarks/layer.py --smoke

For each size, number of experts and number of tokens: the forward, and forward and backward, of the bare layer, one
plain LoRA, ours with each kernel, PEFT's Arrow and mttl's formulation (forward only). `routing alone` is the part of
ours that scores and chooses, which is the same for all kernels. First the outputs, and then the gradients of the
inputs and of all factors, are compared with those of the kernel `eager`. Random experts get random inputs; trained
ones get what a text gives a layer of these sizes in the middle of the base. `experts used` are the distinct ones that
some token chose. Printed are medians in milliseconds; the JSON file has every round.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from sides.experts import Experts
from sides.machine import machine, stopwatch
from sides.one_layer import layer_of_base, random_layer
from sides.options import experts_of, request_of, settle, shared_options
from sides.ours import ADAPTER, routed_layers
from sides.plots import plot_curves
from sides.report import stop_if_different, time_rows, told_machine, write
from sides.rounds import Times, in_turn
from sides.setting import Setting, setting_of
from sides.side import BASE, OURS, XLORA, Side, all_sides, our_model
from sides.touched import touched_experts
from sides.training import check_gradients, training_sides
from sides.verify import check_sides, runnable
from torch import nn


EXACT = 1e-4  # of gradients, relative to their length: with one layer all sides choose the same experts
ROUTING = "routing alone"
FORWARD, BACKWARD = "forward", "forward and backward"


def time_forward(sides: Sequence[Side], x: torch.Tensor, args: argparse.Namespace) -> Times:
    """The layer's forward on x (1, T, I), and our router alone."""
    layer = next(iter(routed_layers(our_model(sides)).values()))

    def call(side: Side) -> float:
        side.prepare()
        with torch.no_grad():
            return stopwatch(lambda: side.model(x), x.device)

    def route() -> float:
        with torch.no_grad():
            return stopwatch(lambda: layer.route(ADAPTER, x), x.device)

    calls: dict[str, Callable[[], float]] = {side.name: lambda side=side: call(side) for side in sides}
    return in_turn({**calls, ROUTING: route}, args.repeats, args.slow)


def time_backward(sides: Sequence[Side], x: torch.Tensor, args: argparse.Namespace) -> Times:
    """Forward and backward, with gradients of x and of all factors that the side has."""

    def call(side: Side) -> float:
        side.prepare()
        side.model.zero_grad(set_to_none=True)
        x.grad = None
        return stopwatch(lambda: loss_of(side.model, x).backward(), x.device)

    return in_turn({side.name: lambda side=side: call(side) for side in sides}, args.repeats, args.slow)


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A sum of the outputs in which each feature has a weight of its own."""
    y = model(x)
    return (y * torch.linspace(-1, 1, y.shape[-1], device=y.device, dtype=y.dtype)).sum()


def measure(base: nn.Module, experts: Experts, x: torch.Tensor, args: argparse.Namespace) -> list[dict]:
    """Check and time one layer with one number of experts and tokens."""
    rows, request, tokens = [], replace(request_of(args), most_xlora=0), x.shape[1]
    linear = next(module for module in base.modules() if isinstance(module, nn.Linear))
    facts = {"in": linear.in_features, "out": linear.out_features, "tokens": tokens}
    facts |= {"experts": experts.count, "routing": experts.kind}
    with tempfile.TemporaryDirectory() as folder:
        sides, absent = all_sides(base, experts, request, [tokens], Path(folder, "inference"))
        absent.pop(XLORA, None)
        found = check_sides(sides, lambda model: model(x))
        facts["used"] = max(touched_experts(our_model(sides), lambda model: model(x)).values())
        sides, missing = runnable(sides, found)
        times = time_forward(sides, x, args)
        times.absent.update({**absent, **missing})
        rows += time_rows(times, {**facts, "work": FORWARD}, found)
        del sides
        gc.collect()
        sides, absent = training_sides(base, experts, request, tokens, Path(folder, "training"))
        if sides:
            x = x.detach().clone().requires_grad_()
            found = check_gradients(sides, lambda model: loss_of(model, x), x, EXACT)
            sides, missing = runnable(sides, found)
            times = time_backward([Side(BASE, base), *sides], x, args)
            times.absent.update({**absent, **missing})
            rows += time_rows(times, {**facts, "work": BACKWARD}, found)
    return rows


def told(rows: list[dict]) -> str:
    """A line for each work: milliseconds by side, the fastest kernel, and what was not run."""
    lines = []
    for work in dict.fromkeys(row["work"] for row in rows):
        mine = [row for row in rows if row["work"] == work]
        timed = {row["side"]: 1000 * row["seconds"] for row in mine if "seconds" in row}
        kernels = {name: ms for name, ms in timed.items() if name.startswith("ours ") and name != OURS}
        fastest = f"; fastest kernel: {min(kernels, key=kernels.get)}" if kernels else ""
        missing = "".join(f"; {row['side']}: {row['missing']}" for row in mine if "missing" in row)
        facts = mine[0]
        lines.append(
            f"{facts['in']}x{facts['out']} E={facts['experts']:<4} T={facts['tokens']:<4} {facts['routing']}, "
            f"{facts['used']} experts used, {work}: "
            + "  ".join(f"{name} {ms:.3g}" for name, ms in timed.items())
            + fastest
            + missing
        )
    return "\n".join(lines)


def panels(rows: list[dict]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """For the plot, the forwards of the first size: tokens -> side -> (experts, milliseconds)."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        is_shown = "seconds" in row and row["work"] == FORWARD and (row["in"], row["out"]) == first_size(rows)
        if is_shown and row["routing"] == rows[0]["routing"]:
            panel = found.setdefault(f"{row['in']}x{row['out']}, {row['tokens']} tokens: ms", {})
            panel.setdefault(row["side"], []).append((row["experts"], 1000 * row["seconds"]))
    return found


def first_size(rows: list[dict]) -> tuple[int, int]:
    """(I, O) of the first row."""
    return rows[0]["in"], rows[0]["out"]


def size(text: str) -> tuple[int, int]:
    """`"576x1536"` -> (576, 1536)."""
    in_features, _, out_features = text.partition("x")
    return int(in_features), int(out_features)


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = shared_options(__doc__, [8, 32, 128, 1000])
    parser.add_argument("--sizes", type=size, nargs="+", default=[(576, 1536), (1536, 576)], help="I x O, as 576x1536")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 512, 2048], help="default: %(default)s")
    parser.set_defaults(repeats=10, slow=5)
    return settle(parser.parse_args(), sizes=[(32, 64)], tokens=[1, 7])


def main() -> None:
    args, rows = options(), []
    print(told_machine(machine(args.device)))
    setting: Setting | None = setting_of(args) if "trained" in args.routing else None
    for routing in args.routing:
        for sizes in args.sizes:
            for count in args.experts:
                for tokens in args.tokens:
                    experts = experts_of(args, routing, count)
                    if setting is not None and routing == "trained":
                        base, experts, x = layer_of_base(setting, experts, sizes, tokens)
                    else:
                        base, x = random_layer(sizes, tokens, args.device, args.dtype)
                    found = measure(base, experts, x, args)
                    print(told(found), flush=True)
                    rows += found
                    write(args.output, "layer", machine(args.device), vars(args), rows)
    if args.output:
        plot_curves(panels(rows), "experts", args.output / "layer.png")
    stop_if_different(rows)


if __name__ == "__main__":
    main()
