"""The kinds of library of the paper's section 5, each with the same number of optimizer steps in all."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..clustering.mbc import MBCClusterer
from ..clustering.summary import told_of_clustering
from ..library.folders import new_file
from ..training.data import Examples, joined
from ..training.poly import train_poly
from ..training.poly_lora import convert_poly
from ..training.recipe import sft_arguments
from ..training.stage import Stage
from .budget import divided, private_share, steps_of_groups
from .build import Build, Built
from .partition import by_state, cluster_names, mean_state, random_examples, random_tasks


def build_private(build: Build) -> Built:
    """One expert for each task."""
    return Built([build.train("private", build.parts, build.steps)], {task: [task] for task in build.parts})


def build_shared(build: Build) -> Built:
    """One expert for all tasks."""
    groups = {"shared": list(build.parts)}
    joint = {"shared": joined("shared", list(build.parts.values()))}
    return Built([build.train("shared", joint, steps_of_groups(groups, build.steps))], groups)


def build_mbc(build: Build) -> Built:
    """Private adapters for 40 % of the steps, clustered by their weights; an expert for each cluster for the rest."""
    first = {task: private_share(steps) for task, steps in build.steps.items()}
    private = build.train("private", build.parts, first)
    clustered, reason = None, None
    if build.setup.processes.is_main and private.records:
        try:
            clustered = cluster(private, build)
        except ValueError as error:  # fewer finished than clusters, or one that learnt nothing
            reason = str(error)
    clustered, reason = build.setup.processes.from_main((clustered, reason))
    if clustered is None:
        failures = {} if reason is None else {"clusters": reason}
        return Built([private, Stage("clusters", build.folder / "clusters", {}, failures)], {})
    groups, made, pictures = clustered
    rest = {task: build.steps[task] - first[task] for task in private.records}
    stages = [private, build.train_groups(groups, rest, private.failures)]
    return Built(stages, groups, {"clustering": made}, pictures)


def cluster(private: Stage, build: Build) -> tuple[dict[str, list[str]], dict[str, Any], dict[Path, str]]:
    """Cluster the private adapters by Model-Based Clustering, and draw it where matplotlib is installed.

    Returns:
        `tuple`: cluster name -> tasks; what the card tells of the clustering; its picture for the card -> caption.

    Raises:
        ValueError: fewer adapters than clusters.
    """
    clusterer = MBCClusterer(build.n_clusters, embedding=build.options.embedding, random_state=build.seed)
    clusterer.fit(private.library(build.setup.base.name))
    groups = {str(name): list(tasks) for name, tasks in clusterer.clusters_.items()}
    try:
        drawn = clusterer.plot(build.folder / "clustering")
    except ImportError as error:
        if build.setup.progress:
            tqdm.write(f"The clustering is not drawn: {error}", file=sys.stderr)
        return groups, told_of_clustering(clusterer), {}
    compared = "updates" if build.options.embedding == "delta" else "numbers of lora_A and lora_B, as in the paper,"
    caption = f"How alike the private adapters are: cosines of their {compared} with a frame around each cluster."
    return groups, told_of_clustering(clusterer), {drawn["similarity"]: caption}


def build_random(build: Build) -> Built:
    """Tasks dealt out by chance."""
    groups = random_tasks(list(build.parts), build.n_clusters, build.seed)
    return Built([build.train_groups(groups, build.steps)], groups)


def build_random_examples(build: Build) -> Built:
    """Rows of all tasks dealt out by chance."""
    joint = random_examples(build.parts, build.n_clusters, build.seed)
    steps = divided(sum(build.steps.values()), cluster_names(build.n_clusters))
    return Built([build.train("clusters", joint, steps)], {name: list(build.parts) for name in joint})


def build_embedding(build: Build) -> Built:
    """Tasks grouped by k-means on the base's mean hidden state of their rows."""
    processes = build.setup.processes
    mine = processes.mine(list(build.parts)) if processes.is_alone_or_main else []
    limit = sft_arguments(build.setup.plan.sft_config, build.folder).max_length
    shown = build.setup.progress and processes.is_main
    bar = tqdm(mine, desc="reading tasks", unit="task", leave=False, disable=not shown)
    states = dict(processes.gather([(task, kept_state(build, build.parts[task], limit)) for task in bar]))
    groups = None
    if processes.is_main:
        groups = by_state({task: states[task] for task in build.parts}, build.n_clusters, build.seed)
    groups = processes.from_main(groups)
    return Built([build.train_groups(groups, build.steps)], groups)


def kept_state(build: Build, part: Examples, limit: int) -> np.ndarray:
    """The mean state of a task's rows; written down, so that a build that goes on does not read them again."""
    base = build.setup.base
    decides = json.dumps([base.identity, part.fingerprint, limit, build.seed])
    path = build.folder / "states" / f"{hashlib.sha256(decides.encode()).hexdigest()[:32]}.npy"
    if path.exists():
        return np.load(path)
    state = mean_state(base.model, base.tokenizer, part, limit, build.seed)
    with new_file(path) as file:
        np.save(file, state)
    return state


def build_poly(build: Build) -> Built:
    """Skills shared by all tasks, one set of weights over them a task (Poly)."""
    return _poly(build, n_splits=1)


def build_mhr(build: Build) -> Built:
    """Poly with weights of their own for each part of a layer's features (MHR)."""
    return _poly(build, n_splits=build.options.n_splits)


def _poly(build: Build, n_splits: int) -> Built:
    model = train_poly(
        build.setup.base,
        build.parts,
        build.folder,
        build.setup.plan,
        build.setup.processes,
        steps=sum(build.steps.values()),
        n_skills=build.options.n_skills,
        n_splits=n_splits,
        progress=build.setup.progress,
    )
    if model.failures:
        return Built([model], {})
    if build.setup.processes.is_main:
        convert_poly(model, build.parts, build.folder / "experts", "experts")
    build.setup.processes.gather([])
    experts = convert_poly(model, build.parts, build.folder / "experts", "experts")
    return Built([model, experts], {task: [task] for task in build.parts})


KINDS: dict[str, Callable[[Build], Built]] = {
    "private": build_private,
    "shared": build_shared,
    "mbc": build_mbc,
    "random": build_random,
    "random_examples": build_random_examples,
    "embedding": build_embedding,
    "poly": build_poly,
    "mhr": build_mhr,
}
CLUSTERED = ("mbc", "random", "random_examples", "embedding")


def describe(kind: str) -> str:
    """One sentence about a kind."""
    return (KINDS[kind].__doc__ or "").strip()
