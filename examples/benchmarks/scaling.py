"""How the cost of routing grows with the number of experts: prefill, decoding and peak memory.

    python examples/benchmarks/scaling.py                            # SmolLM2-135M, 8 to 1,000 experts; an hour
    python examples/benchmarks/scaling.py --adapters my-library --output results
    python examples/benchmarks/scaling.py --sides "ours folded"      # a kernel beside ours auto
    python examples/benchmarks/scaling.py --smoke

For each number of experts the base, one plain LoRA and ours take turns, after the same check as in model.py. All
models together would not fit in memory, so growth is read from the ratios to the plain LoRA, which is in every table
and whose work is always the same. The last table has milliseconds, ratios and the peak extra memory (see memory.py),
and how many times decoding takes longer with 1,000 experts than with 128.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from sides.measure import inference_field, measure_decode, measure_memory, measure_prefill
from sides.options import experts_of, is_issue_setting, settle, shared_options
from sides.plots import plot_curves
from sides.report import stop_if_different
from sides.runs import run_all
from sides.setting import Setting
from sides.side import OURS, PLAIN
from sides.targets import GROWTH


PROMPT, BLOCK, FROM, TO = 16, 16, 128, 1000


def run(setting: Setting, routing: str, count: int) -> list[dict]:
    """One number of experts."""
    args, experts = setting.args, experts_of(setting.args, routing, count)
    with tempfile.TemporaryDirectory() as folder:
        place = inference_field(setting, experts, [1, args.tokens], Path(folder))
        rows = measure_prefill(place, args.tokens)
        rows += measure_decode(place, PROMPT, args.decode, BLOCK)
        return rows + measure_memory(place, args.tokens)


def curve(rows: list[dict], side: str, routing: str) -> dict[int, dict[str, float]]:
    """Number of experts -> milliseconds of prefill and decoding, their ratios to the plain LoRA, and MiB."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["side"] != side or row["routing"] != routing or "missing" in row:
            continue
        point = found.setdefault(row["experts"], {})
        if row["work"] == "memory":
            point["memory"] = row["extra_bytes"] / 2**20
        else:
            point[row["work"]] = 1000 * row["seconds"]
            point[f"{row['work']} ratio"] = row["ratios"][PLAIN]
    return found


def growth(points: dict[int, dict[str, float]], first: int, last: int) -> dict[str, float] | None:
    """How many times decoding takes longer with `last` experts than with `first`: by ratio, and by milliseconds."""
    if not {first, last} <= set(points):
        return None
    return {
        "ratio": points[last]["decode ratio"] / points[first]["decode ratio"],
        "milliseconds": points[last]["decode"] / points[first]["decode"],
    }


def told(points: dict[int, dict[str, float]], side: str, routing: str) -> str:
    """A table in Markdown."""
    lines = [
        f"\n### Growth of {side}, {routing} experts\n",
        "| experts | prefill, ms | / plain LoRA | decode, ms a token | / plain LoRA | peak extra memory, MiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for count, point in sorted(points.items()):
        cells = [
            f"{point[name]:.4g}" if name in point else ""
            for name in ("prefill", "prefill ratio", "decode", "decode ratio", "memory")
        ]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = shared_options(__doc__, [8, 32, FROM, 512, TO])
    parser.add_argument("--tokens", type=int, default=512, help="of the prefill (default: %(default)s)")
    parser.add_argument("--decode", type=int, default=64, help="tokens decoded (default: %(default)s)")
    parser.set_defaults(sides=[OURS], compile=False, cuda_graphs=False)
    return settle(parser.parse_args(), tokens=24, decode=32, experts=[4, 8])


def main() -> None:
    args = options()
    rows = run_all(args, "scaling", run)
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for routing in args.routing:
        for side in dict.fromkeys(row["side"] for row in rows if row["side"].startswith("ours ")):
            points = curve(rows, side, routing)
            print(told(points, side, routing))
            first, last = (FROM, TO) if {FROM, TO} <= set(points) else (min(points), max(points))
            found = growth(points, first, last)
            line = f"decoding with {last} experts takes {found['ratio']:.2f} times as long as with {first}"
            if is_issue_setting(args, "decode", 1) and (first, last) == (FROM, TO):
                line += f", target < {GROWTH:g}: {'met' if found['ratio'] < GROWTH else 'MISSED'}"
            print(f"{line} (by ratios to the plain LoRA; by milliseconds {found['milliseconds']:.2f})")
            for name, label in (("prefill", "prefill, ms"), ("decode", "decode, ms a token"), ("memory", "MiB")):
                mine = [(count, point[name]) for count, point in points.items() if point.get(name, 0) > 0]
                if mine:
                    panels.setdefault(label, {})[f"{side}, {routing}"] = mine
    if args.output:
        plot_curves(panels, "experts", args.output / "scaling.png")
    stop_if_different(rows)


if __name__ == "__main__":
    main()
