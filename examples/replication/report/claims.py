"""The paper's claims about orders, each with our difference and its interval: held, reversed, or open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .collect import Runs
from .numbers import Values, estimate, gaps


HELD, REVERSED, OPEN, ABSENT = "held", "reversed", "open", "not run"
NEAR = 0.1  # of what the better of the two gains over the base; in the paper's Table 1 it is 0.09
DOWN = ("upstream", "sni", "answers")  # suites whose measure is a loss


@dataclass(frozen=True)
class Claim:
    """`worse` is worse than `better` on a suite, or near it.

    Args:
        text (`str`): in the paper's words.
        worse, better (`str`): methods.
        suite (`str`): where; `adapted:<share>` for supervised adaptation.
        is_near (`bool`): the two are near each other instead.
    """

    text: str
    worse: str
    better: str
    suite: str
    is_near: bool = False


ZERO_SHOT = ("sni", "generated", "benchmarks", "answers")
CLAIMS = [
    *(Claim("base < private-uniform", "base", "private/uniform-parameter", suite) for suite in ZERO_SHOT),
    *(
        Claim("private-uniform < private-Arrow", "private/uniform-parameter", "private/arrow-parameter", suite)
        for suite in ZERO_SHOT
    ),
    *(Claim("Shared < private-Arrow", "shared", "private/arrow-parameter", suite) for suite in ZERO_SHOT),
    *(Claim("Shared < MBC-uniform", "shared", "mbc/uniform-parameter", suite) for suite in ZERO_SHOT),
    Claim("private-uniform << private-Arrow", "private/uniform-parameter", "private/arrow-parameter", "upstream"),
    Claim("private-Arrow < oracle", "private/arrow-parameter", "private/oracle", "upstream"),
    *(
        Claim("MBC-uniform near MBC-Arrow", "mbc/arrow-parameter", "mbc/uniform-parameter", suite, is_near=True)
        for suite in ZERO_SHOT
    ),
    *(
        Claim("random examples < random tasks", "random_examples/uniform-parameter", "random/uniform-parameter", suite)
        for suite in ZERO_SHOT
    ),
    *(
        Claim(f"embeddings < {told}", "embedding/uniform-parameter", f"{better}/uniform-parameter", suite)
        for told, better in (("random tasks", "random"), ("MBC", "mbc"))
        for suite in ("sni", "benchmarks", "answers")  # no answers of this library are written
    ),
    *(Claim("random tasks < MBC", "random/uniform-parameter", "mbc/uniform-parameter", suite) for suite in ZERO_SHOT),
    Claim("mean-initialised (MBC) over scratch", "scratch", "mbc-mean", "adapted:0.1"),
    Claim("mean-initialised (private) over scratch", "scratch", "private-mean", "adapted:0.1"),
    Claim("polyz near lorahub", "mbc-lorahub", "mbc-polyz", "adapted:0.1", is_near=True),
    Claim("polyz far under poly", "mbc-polyz", "mbc-poly", "adapted:0.1"),
]


def judge_claims(runs: Runs, adapted: dict[str, dict[str, Values]], base: Values) -> list[dict[str, Any]]:
    """Each claim with `verdict`, and where both sides were run, by how much `better` is better, in its measure."""
    found = []
    for claim in CLAIMS:
        told = {"claim": claim.text, "suite": claim.suite, "worse": claim.worse, "better": claim.better}
        sides = [_values(name, claim.suite, runs, adapted, base) for name in (claim.worse, claim.better, "base")]
        worse, better, bottom = sides
        if not worse or not better:
            found.append({**told, "verdict": ABSENT})
            continue
        gain = _gain(better, worse, claim.suite)
        told |= {"gain": gain, "verdict": HELD if gain["low"] > 0 else OPEN}
        if gain["high"] < 0:
            told["verdict"] = REVERSED
        if claim.is_near:
            most = max(_gain(side, bottom, claim.suite)["mean"] for side in (worse, better)) if bottom else 0.0
            told["near"] = near = round(max(NEAR * most, 0.0), 4)
            is_far = gain["low"] > near or gain["high"] < -near
            told["verdict"] = REVERSED if is_far else HELD if abs(gain["mean"]) < near else OPEN
        found.append(told)
    return found


def _values(name: str, suite: str, runs: Runs, adapted: dict, base: Values) -> Values | None:
    if suite.startswith("adapted:"):
        return base if name == "base" else adapted.get(name, {}).get(suite.partition(":")[2])
    return runs.get(name, {}).get(suite)


def _gain(better: Values, worse: Values, suite: str) -> dict[str, float]:
    """How much better: less loss, or more right answers."""
    is_loss = suite in DOWN or suite.startswith("adapted:")
    return estimate(gaps(worse, better) if is_loss else gaps(better, worse))
