"""What routing costs in a whole model, in prefill, decoding and training, beside the peers.

    python examples/benchmarks/model.py                               # SmolLM2-135M, 8 to 1,000 experts; hours
    python examples/benchmarks/model.py --experts 8 32 --work prefill --repeats 3
    python examples/benchmarks/model.py --adapters my-library --output results   # trained experts and a text as well
    python examples/benchmarks/model.py --sides "ours folded" "PEFT Arrow"       # and base, plain LoRA, ours auto
    python examples/benchmarks/model.py --base random-7b --device cuda --dtype bfloat16 --experts 16 256 \\
        --work prefill decode --tokens 1 32 2048 16384 --compile --cuda-graphs
    python examples/benchmarks/model.py --draw few/model.json many/model.json --output results   # of earlier runs
    python examples/benchmarks/model.py --smoke                       # a pico base, seconds

The sides are the base, one plain PEFT LoRA, ours with the kernel `auto` and with each other, PEFT's Arrow, mttl's
formulation, and X-LoRA. All have the same experts (random ones, or copies of trained adapters with noise) and inputs.
Before anything is timed, each layer of each side is compared with ours with the kernel `eager` on the same inputs, and
then the logits. A side that differs, that needs more memory than there is, or that is not for this machine is reported
and not timed; if one differs, the exit status is 1.

    prefill   --tokens tokens without a cache, logits of the last one; with --compile and --cuda-graphs also so
    decode    64 tokens with a cache after a prompt of 16; the sides take turns every 16 tokens
    train     a step of AdamW on 2 x 128 tokens, the experts of ours and of PEFT's Arrow trainable; PEFT's prototypes
              stay as they are, ours follow the weights

The sides take turns in one process; printed are medians, and medians of the ratios within a round. Then the limit:
what the FLOPs and bytes of top-k LoRA would take on this machine, and how many times that a side adds to the base.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from pathlib import Path

from sides.measure import inference_field, measure_decode, measure_prefill, measure_training
from sides.options import experts_of, settle, shared_options
from sides.plots import plot_curves
from sides.report import stop_if_different
from sides.runs import run_all
from sides.setting import Setting
from sides.side import BASE


PROMPT, BLOCK = 16, 16


def run(setting: Setting, routing: str, count: int) -> list[dict]:
    """All works with `count` experts."""
    args, experts = setting.args, experts_of(setting.args, routing, count)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if {"prefill", "decode"} & set(args.work):
            lengths = [*(args.tokens if "prefill" in args.work else []), *([1] if "decode" in args.work else [])]
            place = inference_field(setting, experts, lengths, Path(folder, "inference"))
            for tokens in args.tokens if "prefill" in args.work else []:
                rows += measure_prefill(place, tokens)
            if "decode" in args.work:
                rows += measure_decode(place, PROMPT, args.decode, BLOCK)
            del place
            gc.collect()
        if "train" in args.work:
            rows += measure_training(setting, experts, args.batch, args.train_tokens, Path(folder, "training"))
            gc.collect()
    return rows


def panels(rows: list[dict]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """For the plot: work -> side -> (experts, ratio to the base, or where there is none to ours)."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if "seconds" not in row or row["side"] == BASE:
            continue
        other = BASE if row["ratios"][BASE] is not None else "ours auto"
        work = {"prefill": f"prefill of {row['tokens']}"}.get(row["work"], row["work"])
        title = f"{work} ({row['routing']}, {row['mode']}): time / {other}"
        found.setdefault(title, {}).setdefault(row["side"], []).append((row["experts"], row["ratios"][other]))
    return found


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = shared_options(__doc__, [8, 32, 128, 1000])
    works = ["prefill", "decode", "train"]
    parser.add_argument("--work", nargs="+", choices=works, default=works, help="default: all")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512], help="of a prefill (default: %(default)s)")
    parser.add_argument("--decode", type=int, default=64, help="tokens decoded (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="rows of a training step (default: %(default)s)")
    parser.add_argument("--train-tokens", type=int, default=128, help="of a row (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="also time prefills through torch.compile")
    parser.add_argument("--cuda-graphs", action="store_true", help="also time prefills as CUDA graphs")
    parser.add_argument(
        "--draw", type=Path, nargs="+", metavar="FILE", help="model.json files to draw together; nothing is measured"
    )
    return settle(parser.parse_args(), tokens=[24], decode=32, train_tokens=12)


def main() -> None:
    args = options()
    if args.draw:
        rows = [row for file in args.draw for row in json.loads(file.read_text())["measured"]]
        plot_curves(panels(rows), "experts", (args.output or Path()) / "model.png")
        return
    rows = run_all(args, "model", run)
    if args.output:
        plot_curves(panels(rows), "experts", args.output / "model.png")
    stop_if_different(rows)


if __name__ == "__main__":
    main()
