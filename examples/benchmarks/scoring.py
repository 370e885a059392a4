"""What choosing among many experts costs: all scores in float32, or two stages, beside the base's own products.

    python examples/benchmarks/scoring.py --threads 1 --output results
    python examples/benchmarks/scoring.py --experts 1000 --tokens 512 --adapters my-library    # also trained experts
    python examples/benchmarks/scoring.py --smoke

For each group of modules that share an input (q, k, v; o; gate, up; down) of a layer in the middle of the base, with
the inputs that a text gives them. Random prototypes have random directions; trained ones are those of the adapters
given, and of copies of them with noise on their factors up to the number of experts. First, scores and experts are
compared with scores in float64; a choice counts as changed where a token's experts are others than those. Then all
sides are timed in turn: `base` is the group's own product with the base's weights, `full` scores all in float32 and
takes the largest, `two stages` is proven to choose the same, `margin 0.1` takes a tenth of the proven bound,
`bfloat16 alone` decides by the product in bfloat16. `as it comes` is what the package takes at that size. Printed are
medians in milliseconds and the medians of the ratios to `full` and `base`; the JSON file has every round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sides.bases import linear_modules
from sides.experts import Experts
from sides.machine import machine, stopwatch
from sides.options import experts_of, settle, shared_options
from sides.plots import plot_curves
from sides.report import told_machine, write
from sides.rounds import in_turn
from sides.setting import Setting, setting_of
from torch import nn

from peft_arrow.ops.scoring import scores_in_two_stages, scoring_index, top_k_in_full, top_k_in_two_stages


GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
BASE, FULL, TWO, INEXACT, ALONE, POLICY = "base", "full", "two stages", "margin 0.1", "bfloat16 alone", "as it comes"
CHOICES = (TWO, INEXACT, ALONE, POLICY)


@dataclass(frozen=True)
class Case:
    """A group of modules with prototypes, and inputs.

    Args:
        facts (`dict`): what all its rows have.
        weight_OI (`torch.Tensor`): the base's weights of the group, one below the other.
        prototypes (`list[torch.Tensor]`): (E, I) of each module.
        x_TI (`torch.Tensor`): inputs.
    """

    facts: dict
    weight_OI: torch.Tensor
    prototypes: list[torch.Tensor]
    x_TI: torch.Tensor


def members(base: nn.Module, last_names: Sequence[str]) -> dict[str, nn.Linear]:
    """The modules of a group in the middle layer, by name."""
    found = [
        {name: linear for name, linear in linear_modules(base).items() if name.endswith(last)} for last in last_names
    ]
    return {name: linear for one in found for name, linear in [list(one.items())[len(one) // 2]]}


@torch.no_grad()
def inputs_of(setting: Setting, name: str, tokens: int) -> torch.Tensor:
    """What a text gives a module, (T, I)."""
    seen: list[torch.Tensor] = []
    hook = setting.base.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(args[0]))
    try:
        setting.base(input_ids=setting.ids("trained", tokens), use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return seen[0].flatten(0, -2)


def prototypes_of(experts: Experts, name: str, linear: nn.Linear) -> torch.Tensor:
    """Of each expert the direction that its update amplifies most, (E, I); of random experts a random direction."""
    if not experts.sources:
        generator = torch.Generator().manual_seed(len(name) + linear.in_features)
        rows_EI = torch.randn(experts.count, linear.in_features, generator=generator)
        return nn.functional.normalize(rows_EI, dim=1).to(linear.weight.device)
    lora_A, lora_B = (factor.double() for factor in experts.factors(name, linear))
    # with A A^T = L L^T, the vectors of B A are those of B L, turned by L^-1 A
    triangle_ERR = torch.linalg.cholesky(lora_A @ lora_A.mT)
    inner_ERR = triangle_ERR.mT @ (lora_B.mT @ lora_B) @ triangle_ERR
    top_ER1 = torch.linalg.eigh(inner_ERR).eigenvectors[..., -1:]
    turned_ER1 = torch.linalg.solve_triangular(triangle_ERR.mT, top_ER1, upper=True)
    return nn.functional.normalize((lora_A.mT @ turned_ER1).squeeze(-1), dim=1).float()


def changed(index_GTK: torch.Tensor, case: Case, k: int) -> float:
    """Share of tokens and modules whose experts are not the k largest in float64."""
    x_TI, shares = case.x_TI.double().cpu().numpy(), []
    for index_TK, rows_EI in zip(index_GTK.cpu().numpy(), case.prototypes, strict=True):
        true_TE = np.abs(x_TI @ rows_EI.double().cpu().numpy().T)
        expected_TK = np.argpartition(-true_TE, k - 1, axis=1)[:, :k]
        shares.append((np.sort(index_TK, axis=1) != np.sort(expected_TK, axis=1)).any(axis=1).mean())
    return float(np.mean(shares))


def regret(index_GTK: torch.Tensor, case: Case, k: int) -> float:
    """By how much a true score that was left out exceeds one that was taken, at most, relative to |x|."""
    x_TI, worst = case.x_TI.double().cpu().numpy(), 0.0
    for index_TK, rows_EI in zip(index_GTK.cpu().numpy(), case.prototypes, strict=True):
        true_TE = np.abs(x_TI @ rows_EI.double().cpu().numpy().T)
        kth_T = np.partition(true_TE, -k, axis=1)[:, -k]
        least_T = np.take_along_axis(true_TE, index_TK, axis=1).min(axis=1)
        worst = max(worst, float(((kth_T - least_T) / np.linalg.norm(x_TI, axis=1)).max()))
    return worst


def sides_of(case: Case, k: int) -> dict[str, Callable[[], object]]:
    """What is timed; each but `base` returns scores and experts (G, T, K)."""
    x_TI, index = case.x_TI, scoring_index(case.prototypes)
    stacked_GIE = torch.stack(case.prototypes).bfloat16().mT
    is_taken = scores_in_two_stages(len(x_TI), *case.prototypes[0].shape, k, x_TI.device)
    taken = (
        (lambda: top_k_in_two_stages(x_TI, index, k)) if is_taken else lambda: top_k_in_full(x_TI, case.prototypes, k)
    )

    def alone():
        scores = torch.stack([torch.mm(x_TI.bfloat16(), rows_IE) for rows_IE in stacked_GIE])
        return torch.topk(scores.abs_(), k, dim=-1)

    return {
        BASE: lambda: x_TI.to(case.weight_OI.dtype) @ case.weight_OI.t(),
        FULL: lambda: top_k_in_full(x_TI, case.prototypes, k),
        TWO: lambda: top_k_in_two_stages(x_TI, index, k),
        INEXACT: lambda: top_k_in_two_stages(x_TI, index, k, margin=0.1),
        ALONE: alone,
        POLICY: taken,
    }


@torch.inference_mode()
def measure(case: Case, args: argparse.Namespace) -> list[dict]:
    """Check and time one case."""
    sides, k = sides_of(case, args.top_k), args.top_k
    found = {name: call() for name, call in sides.items() if name != BASE}
    for name in (FULL, TWO, POLICY):
        worst = regret(found[name][1], case, k)
        if worst > 8 * case.x_TI.shape[1] * 2.0**-24:
            raise SystemExit(f"{name} left out an expert whose score is higher by {worst:.1e} |x|: {case.facts}")
    calls = {name: lambda call=call: stopwatch(call, case.x_TI.device) for name, call in sides.items()}
    times = in_turn(calls, args.repeats, args.slow)
    return [
        {
            **case.facts,
            "side": name,
            "seconds": times.median(name),
            "rounds": times.seconds[name],
            "ratios": {other: times.ratio(name, other) for other in (BASE, FULL)},
            "changed": None if name == BASE else changed(found[name][1], case, k),
            "full_share": getattr(found.get(name), "full_share", None),
        }
        for name in sides
    ]


def told(rows: Sequence[dict], k: int) -> str:
    """One line a case: milliseconds, and beside them the ratios and the share of changed choices."""
    by_side = {row["side"]: row for row in rows}
    facts, parts = rows[0], [f"base {1000 * by_side[BASE]['seconds']:.3g} ms"]
    for name in (FULL, *CHOICES):
        row = by_side[name]
        part = f"{name} {1000 * row['seconds']:.3g} = {row['ratios'][BASE]:.2f} base"
        part += "" if name == FULL else f" = {row['ratios'][FULL]:.2f} full"
        parts.append(part + (f", {row['changed']:.3%} changed" if row["changed"] else ""))
    head = f"{facts['modules']} I={facts['in']} E={facts['experts']} T={facts['tokens']} K={k} {facts['routing']}"
    return f"{head}: " + "; ".join(parts) + f"; scored in full {by_side[TWO]['full_share']:.2%}"


def told_layers(rows: Sequence[dict]) -> str:
    """The sums over the groups of a layer, by routing, experts and tokens."""
    lines = ["", "All linear modules of a layer: ms, times the base's"]
    for key in dict.fromkeys((row["routing"], row["experts"], row["tokens"]) for row in rows):
        mine = [row for row in rows if (row["routing"], row["experts"], row["tokens"]) == key]
        sums = {name: sum(row["seconds"] for row in mine if row["side"] == name) for name in (BASE, FULL, *CHOICES)}
        timed = "  ".join(f"{name} {1000 * all_:.3g} ({all_ / sums[BASE]:.2f})" for name, all_ in sums.items())
        lines.append(f"{key[0]} E={key[1]} T={key[2]}: {timed}")
    return "\n".join(lines)


def panels(rows: Sequence[dict]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """For the plot: modules, with the most tokens -> side -> (experts, milliseconds)."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if row["tokens"] == max(one["tokens"] for one in rows) and row["routing"] == rows[0]["routing"]:
            panel = found.setdefault(f"{row['modules']}, {row['tokens']} tokens: ms", {})
            panel.setdefault(row["side"], []).append((row["experts"], 1000 * row["seconds"]))
    return found


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = shared_options(__doc__, [256, 512, 1000, 4000])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 64, 128, 512], help="default: %(default)s")
    parser.set_defaults(repeats=9, slow=5)
    args = settle(parser.parse_args(), tokens=[1, 70])
    if args.smoke:
        args.experts = [6, 600]
    return args


def main() -> None:
    args, rows = options(), []
    print(told_machine(machine(args.device)))
    setting = setting_of(args)
    for group in GROUPS:
        modules = members(setting.base, group)
        inputs_TI = inputs_of(setting, next(iter(modules)), max(args.tokens))
        weight_OI = torch.cat([linear.weight.detach() for linear in modules.values()])
        for routing in args.routing:
            for count in args.experts:
                experts = experts_of(args, routing, count)
                prototypes = [prototypes_of(experts, name, linear) for name, linear in modules.items()]
                for tokens in args.tokens:
                    facts = {"modules": ",".join(name.removesuffix("_proj") for name in group), "routing": routing}
                    facts |= {"in": weight_OI.shape[1], "out": len(weight_OI), "experts": count, "tokens": tokens}
                    case = Case(facts, weight_OI, prototypes, inputs_TI[:tokens].contiguous())
                    measured = measure(case, args)
                    print(told(measured, args.top_k), flush=True)
                    rows += measured
                    write(args.output, "scoring", machine(args.device), vars(args), rows)
    print(told_layers(rows))
    if args.output:
        plot_curves(panels(rows), "experts", args.output / "scoring.png")


if __name__ == "__main__":
    main()
