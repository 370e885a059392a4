"""The results of one seed as one small file: what is in the tables, claims and figures, and nothing else."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
from sklearn.metrics import adjusted_rand_score
from steps.setting import Setting

from .beyond import beyond
from .claims import judge_claims
from .collect import Runs, read_adapted, read_base, read_costs, read_each, read_judged
from .costs import scale
from .numbers import correlation, estimate, gaps


BEYOND = (("private",), ("mbc",), ("private", "mbc"))
LED = ("private/arrow", "private/calibrated-norm", "private/oracle")
LOSSES = ("upstream", "sni")


def make_results(setting: Setting) -> dict[str, Any]:
    """Everything that can be told of the setting's seed from what is in the folder."""
    root, seed, category = setting.root, setting.seed, setting.suites.category
    runs, base = read_judged(root, seed), read_base(root)
    adapted = whole(read_adapted(root, seed), len(setting.suites.judged["sni"]))
    costs = read_costs(setting)
    return {
        "config": setting.config,
        "categories": category,
        "methods": methods(runs, category),
        "supervised": supervised(adapted, base),
        "claims": judge_claims(runs, adapted, base),
        "shared_lead": shared_lead(runs),
        "beyond": {"-".join(kinds): found for kinds in BEYOND if (found := beyond(runs, *kinds))},
        "similarity": similarities(read_each(root, "similarity", seed)),
        "transfer": transfer(read_each(root, "transfer", seed)),
        "clusters": clusters(runs, len(setting.suites.upstream), setting.config["clusters"]),
        "routing": routing(read_each(root, "routing", seed), category),
        "partitions": partitions(setting),
        "costs": costs,
        "large": scale(costs),
    }


def whole(adapted: dict, tasks: int) -> dict:
    """Ways of adapting by share of the data; what is not through all tasks is left out: its mean would mislead."""
    return {
        way: {share: losses for share, losses in shares.items() if len(losses) == tasks}
        for way, shares in adapted.items()
        if any(len(losses) == tasks for losses in shares.values())
    }


def methods(runs: Runs, category: dict[str, str]) -> dict[str, Any]:
    """Method -> suite -> estimate, and the mean of each task; held-out tasks also near and far."""
    found: dict[str, Any] = {}
    for name, suites in runs.items():
        told: dict[str, Any] = {}
        for suite, values in suites.items():
            told[suite] = {**estimate(values), "by_task": {task: _mean(rows) for task, rows in values.items()}}
        for side in ("near", "far"):
            part = {task: rows for task, rows in suites.get("sni", {}).items() if category[task].startswith(side)}
            if part:
                told[side] = estimate(part)
        found[name] = told
    return found


def _mean(rows: list[float]) -> float:
    return round(statistics.fmean(rows), 4)


def shared_lead(runs: Runs) -> dict[str, Any]:
    """Ways to use private experts -> suite -> by how much less loss the one shared LoRA has on the same rows."""
    found: dict[str, Any] = {}
    for way in LED:
        pairs = {suite: (runs.get("shared", {}).get(suite), runs.get(way, {}).get(suite)) for suite in LOSSES}
        told = {suite: estimate(gaps(its, ours)) for suite, (ours, its) in pairs.items() if ours and its}
        if told:
            found[way] = told
    return found


def supervised(adapted: dict, base: dict) -> dict[str, Any]:
    """Way -> share of the data -> estimate; the base has one."""
    found: dict[str, Any] = {"base": {"0": estimate(base)}} if base else {}
    for way, shares in adapted.items():
        found[way] = {share: estimate(tasks) for share, tasks in shares.items()}
    return found


def similarities(read: dict[str, Any]) -> dict[str, Any]:
    """Library -> mean cosine of two different experts, by updates and by numbers."""
    found = {}
    for library, told in read.items():
        size = len(told["names"])
        if size < 2:
            continue
        off = ~np.eye(size, dtype=bool)
        found[library] = {key: round(float(np.array(told[key])[off].mean()), 4) for key in ("delta", "factors")}
        found[library]["experts"] = size
    return found


def transfer(read: dict[str, Any]) -> dict[str, Any] | None:
    """Pairs of tasks: similarity, and by how much joint training beats private; with their correlation."""
    points = []
    for told in read.values():
        gain = statistics.fmean(
            statistics.fmean(told["losses"]["private"][task]) - statistics.fmean(told["losses"]["joint"][task])
            for task in (told["one"], told["other"])
        )
        points.append({**{key: told[key] for key in ("one", "other", "delta", "factors")}, "gain": round(gain, 4)})
    if len(points) < 3:
        return None
    gains = [point["gain"] for point in points]
    return {
        "points": points,
        **{key: correlation([point[key] for point in points], gains) for key in ("delta", "factors")},
    }


def clusters(runs: Runs, upstream: int, count: int) -> list[dict[str, Any]]:
    """By number of clusters: one is the shared library, one a task the private one; neither needs clustering.

    `told` and `uniform` are the training tasks' losses with their own expert and with the mean of all, `held_out`
    those of the held-out tasks with the mean of all.
    """
    found = []
    for number, ways in (
        (1, ("shared", "shared")),
        (count, ("mbc/oracle", "mbc/uniform-parameter")),
        (upstream, ("private/oracle", "private/uniform-parameter")),
    ):
        told, uniform = (runs.get(way) for way in ways)
        if told and uniform:
            values = {
                "told": told.get("upstream"),
                "uniform": uniform.get("upstream"),
                "held_out": uniform.get("sni"),
            }
            found.append({"clusters": number, **{name: estimate(one) for name, one in values.items() if one}})
    return found


def partitions(setting: Setting) -> dict[str, Any]:
    """Library of clusters -> its groups, and how far they are the tasks' categories (adjusted Rand index)."""
    found, category = {}, setting.suites.category
    for folder in sorted((setting.root / "libraries").glob(f"mbc-{setting.seed}")):
        groups = setting.groups(folder.name)
        pairs = [(expert, category[task]) for expert, tasks in groups.items() for task in tasks]
        index = adjusted_rand_score([pair[1] for pair in pairs], [pair[0] for pair in pairs])
        found[folder.name] = {"rand": round(float(index), 3), "groups": groups}
    return found


def routing(read: dict[str, Any], category: dict[str, str]) -> dict[str, Any]:
    """Library -> router -> agreement over all and by layer, entropy by layer, and the most frequent errors."""
    found: dict[str, Any] = {}
    for library, told in read.items():
        for router, measured in told["routers"].items():
            agreement = measured["agreement"]
            found.setdefault(library, {})[router] = {
                "all": agreement["all"],
                "layer": agreement["layer"],
                "entropy": measured["entropy"],
                "errors": errors(told["experts"], told["own"], measured["shares"], category),
            }
    return found


def errors(
    experts: list[str], own: dict[str, str], shares: dict[str, list[float]], category: dict[str, str], count: int = 8
) -> list[dict[str, Any]]:
    """The tasks' largest shares on experts that are not their own, and whether those are of the same category."""
    wrong = []
    for task, row in shares.items():
        others = [(share, expert) for share, expert in zip(row, experts) if expert != own[task]]
        share, expert = max(others, default=(0.0, ""))
        kin = {category[other] for other, home in own.items() if home == expert}
        own_share = row[experts.index(own[task])]
        wrong.append(
            {
                "task": task,
                "own_share": round(own_share, 4),
                "expert": expert,
                "share": round(share, 4),
                "same_category": category[task] in kin,
            }
        )
    return sorted(wrong, key=lambda row: row["own_share"] - row["share"])[:count]
