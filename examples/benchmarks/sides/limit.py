"""What top-k LoRA cannot do without: FLOPs and bytes from the shapes, and their time on this machine.

A token needs the products with A and B of its K experts, 2 K R (I + O) FLOPs a module. The factors of every expert
that some token of a forward goes to are read once a forward. Scoring as Arrow defines it takes another 2 E I FLOPs a
token and reads the prototypes, 4 E I bytes; a router could score with less, so the limit is stated without and with
it. Inputs are read and outputs written by the base already. A backward takes twice the products of the forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from .side import BASE, PLAIN


@dataclass(frozen=True)
class Need:
    """FLOPs and bytes of one module or of many."""

    flops: float
    read: float

    def seconds(self, peaks: tuple[float, float]) -> float:
        """At the machine's (FLOPs, bytes) a second, the longer of both."""
        return max(self.flops / peaks[0], self.read / peaks[1])


@dataclass(frozen=True)
class Limit:
    """What one forward needs, summed over the modules.

    Args:
        base, lora (`Need`): the base's linear modules; one plain LoRA.
        apply (`Need`): the chosen experts, without scores.
        score (`Need`): Arrow's scores.
        seconds (`dict[str, float]`):
            Of `"base"`, `"lora"`, `"apply"` and `"apply+score"` on this machine, module by module.
    """

    base: Need
    lora: Need
    apply: Need
    score: Need
    seconds: dict[str, float]


def limit_of(
    linears: Mapping[str, nn.Linear],
    touched: Mapping[str, int],
    tokens: int,
    experts: int,
    rank: int,
    top_k: int,
    peaks: tuple[float, float],
    trains: bool = False,
) -> Limit:
    """The limit of one forward, or with `trains` of a forward and a backward.

    Args:
        linears (`Mapping[str, nn.Linear]`): the modules with experts.
        touched (`Mapping[str, int]`): module -> distinct experts chosen by the tokens.
        tokens, experts, rank, top_k (`int`): T, E, R, K.
        peaks (`tuple[float, float]`): FLOPs and bytes a second of the machine.
        trains (`bool`): whether a backward is counted.
    """
    times, kept = (3 if trains else 1), min(top_k, experts)
    totals = {name: [0.0, 0.0] for name in ("base", "lora", "apply", "score")}
    seconds = dict.fromkeys(("base", "lora", "apply", "apply+score"), 0.0)
    for name, linear in linears.items():
        (out_features, in_features), size = linear.weight.shape, linear.weight.itemsize
        both = in_features + out_features
        needs = {
            "base": Need((times - trains) * 2 * tokens * in_features * out_features, linear.weight.nbytes),
            "lora": Need(times * 2 * tokens * rank * both, rank * both * size),
            "apply": Need(times * 2 * tokens * kept * rank * both, touched[name] * rank * both * size),
            "score": Need(2 * tokens * experts * in_features, 4 * experts * in_features),
        }
        for key, need in needs.items():
            totals[key][0] += need.flops
            totals[key][1] += need.read
        for key in seconds:
            parts = [needs[part] for part in key.split("+")]
            joined = Need(sum(part.flops for part in parts), sum(part.read for part in parts))
            seconds[key] += joined.seconds(peaks)
    return Limit(**{key: Need(*values) for key, values in totals.items()}, seconds=seconds)


def add_limits(rows: list[dict], limit: Limit) -> None:
    """Put into each measured row how far it is from the limit.

    `times_limit` is the time added to the base's, divided by the least that it could be; `share_of_peak` is the least
    time of the base's and the experts' products divided by the time measured (attention and the head count as waste).
    """
    base = next((row["seconds"] for row in rows if row["side"] == BASE and "seconds" in row), None)
    for row in rows:
        if "seconds" not in row:
            continue
        key = {BASE: None, PLAIN: "lora"}.get(row["side"], "apply+score")
        least = 0.0 if key is None else limit.seconds[key]
        row["share_of_peak"] = (limit.seconds["base"] + least) / row["seconds"]
        row["times_limit"] = (row["seconds"] - base) / least if base is not None and least else None


COLUMNS = {
    "added, times the limit": lambda row: "" if row["times_limit"] is None else f"{row['times_limit']:.1f}",
    "share of peak": lambda row: f"{row['share_of_peak']:.2f}",
}


def describe(limit: Limit, peaks: tuple[float, float]) -> str:
    """For people."""
    needs = {
        "base": limit.base,
        "one plain LoRA": limit.lora,
        "chosen experts": limit.apply,
        "scores": limit.score,
    }
    shapes = [f"{name} {need.flops / 1e9:.3g} GFLOP, {need.read / 1e6:.3g} MB" for name, need in needs.items()]
    names = {"base": "base", "lora": "one plain LoRA", "apply": "chosen experts", "apply+score": "with scores"}
    times = [f"{names[key]} {1000 * value:.3g} ms" for key, value in limit.seconds.items()]
    return (
        f"limit, of the modules with experts alone: {'; '.join(shapes)}\n"
        f"at {peaks[0] / 1e9:.0f} GFLOP/s and {peaks[1] / 1e9:.1f} GB/s, measured here: {', '.join(times)}"
    )
