"""The peak extra memory of a prefill: the largest live bytes inside the routed layers, less the base's.

    python examples/benchmarks/memory.py                             # SmolLM2-135M, 512 tokens, minutes
    python examples/benchmarks/memory.py --experts 8 32 --adapters my-library --output results
    python examples/benchmarks/memory.py --experts 64 --paged        # resident memory, paged to a folder and not
    python examples/benchmarks/memory.py --smoke

How it is measured: every operator that runs while a routed layer is in its forward is watched below autograd
(`TorchDispatchMode`); a storage that none of its inputs has is an allocation, and counts until it is freed, wherever
that is. The peak over a prefill without a cache, logits of the last token only, less that of the base, whose linear
layers are watched in the same way, is the extra memory. So weights and what was built before do not count, outputs
count alike for all sides, and what an operator allocates for itself and frees before it returns is not seen. It is not
the memory of the process, which an allocator rounds and keeps. Nothing is timed here.

Also the bytes of one expert: rank x (I + O) numbers a module in the dtype of the base, and a prototype of I numbers in
float32; beside it what the parameters of the routed model hold. With --paged also what loading the experts from their
files, building prototypes and one prefill add to the resident memory of a process of its own: private memory (RssAnon)
and mapped files (RssFile), with the experts in memory and with `expert_store=<folder>`.

Each layer of each side is compared before, as in model.py.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from peft import PeftModel
from sides.bases import linear_modules
from sides.experts import expert_bytes
from sides.measure import inference_field, measure_memory
from sides.options import experts_of, is_issue_setting, settle, shared_options
from sides.paged import measure_paged, told_paged
from sides.plots import plot_curves
from sides.report import stop_if_different
from sides.runs import run_all
from sides.setting import Setting
from sides.side import OURS, our_model
from sides.targets import verdicts
from torch import nn


def table(rows: list[dict]) -> str:
    """In Markdown."""
    extra = {row["side"]: row["extra_bytes"] for row in rows if "extra_bytes" in row}
    lines = ["| side | peak, MiB | less the base's, MiB | / ours auto |", "| --- | --- | --- | --- |"]
    for row in rows:
        if "missing" in row:
            lines.append(f"| {row['side']} | {row['missing']} | | |")
            continue
        ratio = f"{row['extra_bytes'] / extra[OURS]:.2f}" if extra.get(OURS, 0) > 0 else ""
        lines.append(
            f"| {row['side']} | {row['peak_bytes'] / 2**20:.4g} | {row['extra_bytes'] / 2**20:.4g} | {ratio} |"
        )
    return "\n".join(lines)


def bytes_of_an_expert(base: nn.Module, ours: PeftModel, experts: int, rank: int) -> dict[str, float]:
    """The formula's bytes of one expert, and the measured bytes of all that the experts hold, a share of each."""
    linears = linear_modules(base).values()
    factors, prototypes = expert_bytes(base, rank), sum(4 * linear.in_features for linear in linears)
    held = sum(value.nbytes for name, value in ours.named_parameters() if "arrow_lora_" in name)
    return {
        "formula_factors": factors,
        "formula_prototypes": prototypes,
        "formula": factors + prototypes,
        "measured": held / experts,
    }


def run(setting: Setting, routing: str, count: int) -> list[dict]:
    """One number of experts."""
    args, experts = setting.args, experts_of(setting.args, routing, count)
    with tempfile.TemporaryDirectory() as folder:
        place = inference_field(setting, experts, [args.tokens], Path(folder))
        rows = measure_memory(place, args.tokens)
    extra = {row["side"]: row["extra_bytes"] for row in rows if "extra_bytes" in row}
    print(f"\n### Peak memory of a prefill of {args.tokens} tokens, {count} {routing} experts\n")
    print(table(rows))
    if is_issue_setting(args, "memory", args.tokens):
        print("\n".join(verdicts("memory", count, lambda a, b: extra[a] / extra[b] if {a, b} <= set(extra) else None)))
    each = bytes_of_an_expert(setting.base, our_model(place.sides), count, experts.rank)
    print(
        f"bytes an expert: {each['formula']:,.0f} by the formula ({each['formula_factors']:,} of factors and "
        f"{each['formula_prototypes']:,} of prototypes), {each['measured']:,.0f} measured "
        f"({each['measured'] / each['formula']:.4f} times)",
        flush=True,
    )
    rows.append({"work": "bytes an expert", "experts": count, "routing": routing, "side": OURS, **each})
    if args.paged:
        paged = measure_paged(args, setting.base, experts)
        print(told_paged(paged), flush=True)
        rows += [{"routing": routing, **row} for row in paged]
    return rows


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = shared_options(__doc__, [8, 32, 128, 1000])
    parser.add_argument("--tokens", type=int, default=512, help="of the prefill (default: %(default)s)")
    parser.add_argument("--paged", action="store_true", help="also the resident memory with paged experts")
    parser.set_defaults(xlora_experts=0)
    return settle(parser.parse_args(), tokens=24, paged=True)


def main() -> None:
    args = options()
    rows = run_all(args, "memory", run)
    if args.output:
        curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for row in rows:
            if row.get("extra_bytes", 0) > 0:
                panel = curves.setdefault(f"peak extra memory, MiB ({row['routing']})", {})
                panel.setdefault(row["side"], []).append((row["experts"], row["extra_bytes"] / 2**20))
        plot_curves(curves, "experts", args.output / "memory.png")
    stop_if_different(rows)


if __name__ == "__main__":
    main()
