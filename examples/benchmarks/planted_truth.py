"""Does clustering by weights find which adapters were trained for the same task?

    python examples/benchmarks/planted_truth.py --output truth            # five seeds; hours on two cores
    python examples/benchmarks/planted_truth.py --output truth --plots    # also a picture of each clustering
    python examples/benchmarks/planted_truth.py --smoke                   # a pico base, three tasks, two steps

Every task of the quickstart is trained in three versions of SmolLM2-135M adapters, of mixed or equal ranks,
with one initialisation of A for all of a seed ("shared") or one for each adapter ("own"). Then the versions are
clustered into as many clusters as there are tasks, and into as many as there are families of tasks, and compared with
the truth by the adjusted Rand index. The paper's recipe needs equal shapes, so it is judged where the ranks are equal,
beside `delta`. A folder of --output holds each adapter; what is complete is not trained again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
from sklearn.metrics import adjusted_rand_score
from tqdm import tqdm

from peft_arrow import AdapterLibrary, MBCClusterer, train_adapter
from peft_arrow.quickstart.base import load_base, silence_known_warnings
from peft_arrow.quickstart.task_list import load_tasks


# (rank, alpha) of a task's three versions, where they are to differ.
MIXED = ((4, 16), (8, 16), (16, 8))
EQUAL = ((8, 16),) * 3
ROWS = 240
RECIPE = {
    "learning_rate": 2e-3,
    "gradient_accumulation_steps": 1,
    "max_grad_norm": 1.0,
    "warmup_steps": 0,
    "max_length": 160,
    "save_strategy": "no",
}


@dataclass(frozen=True)
class Plan:
    """One clustering: which versions, and whether they start from one A.

    Args:
        ranks (`str`): `"mixed"` or `"equal"`.
        start (`str`): `"shared"` or `"own"`.
    """

    ranks: str
    start: str

    def versions(self) -> tuple[tuple[int, int], ...]:
        """(rank, alpha) of each version."""
        return MIXED if self.ranks == "mixed" else EQUAL

    def init_seed(self, seed: int, version: int, task: str) -> int:
        """Of A: one for a seed, or one for each adapter."""
        return seed if self.start == "shared" else crc32(f"{seed} {version} {task}".encode())


PLANS = {f"{ranks}-{start}": Plan(ranks, start) for ranks in ("mixed", "equal") for start in ("own", "shared")}


class Trainer:
    """Trains the versions of all tasks on one base, which is loaded once; what is complete is not trained again."""

    def __init__(self, base: str | None, steps: int, batch_size: int, root: Path) -> None:
        self.model, self.tokenizer = load_base(base)
        self.steps, self.batch_size, self.root = steps, batch_size, root

    def __call__(self, plan: Plan, seed: int, tasks: list) -> AdapterLibrary:
        """All versions of all tasks; names are `task-version`. Versions see other rows in another order."""
        places = {}
        for version, (rank, alpha) in enumerate(plan.versions()):
            folder = self.root / f"seed-{seed}" / plan.start / f"version-{version}-rank-{rank}"
            for task in tqdm(tasks, desc=f"seed {seed}, {plan.ranks} ranks, {plan.start} A, version {version}"):
                rows = [
                    {"prompt": row.prompt, "completion": row.completion}
                    for row in task.train_rows(ROWS, seed=10 * seed + version)
                ]
                places[f"{task.name}-{version}"] = train_adapter(
                    self.model,
                    rows,
                    tokenizer=self.tokenizer,
                    output_dir=folder / task.name,
                    steps=self.steps,
                    init_seed=plan.init_seed(seed, version, task.name),
                    sft_config={**RECIPE, "per_device_train_batch_size": self.batch_size, "seed": 10 * seed + version},
                    lora_config={"r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "target_modules": "all-linear"},
                    progress=False,
                )
        return AdapterLibrary.from_pretrained(places, base_model=self.model.name_or_path)


def judge(library: AdapterLibrary, tasks: list, embedding: str, grouping: str, plots: Path | None) -> dict:
    """Adjusted Rand index for the tasks and for their families, and the cosines inside and between tasks."""
    family = {task.name: task.family for task in tasks}
    of_task = [name.rpartition("-")[0] for name in library]
    of_family = [family[name] for name in of_task]
    found = {}
    for name, truth in (("tasks", of_task), ("families", of_family)):
        clusterer = MBCClusterer(len(set(truth)), embedding=embedding, grouping=grouping).fit(library)
        found[name] = float(adjusted_rand_score(truth, clusterer.labels_))
        if plots:
            clusterer.plot(plots / name)
    same = np.equal.outer(of_task, of_task)
    other = ~same
    np.fill_diagonal(same, False)
    cosines = clusterer.similarity_
    return {**found, "same_task": float(cosines[same].mean()), "other_tasks": float(cosines[other].mean())}


def ways(plan: Plan) -> list[tuple[str, str]]:
    """(embedding, grouping) that the plan's adapters allow."""
    delta = [("delta", "average"), ("delta", "spectral")]
    return [*delta, ("paper", "average")] if plan.ranks == "equal" else delta


def run(args: argparse.Namespace, root: Path) -> list[dict]:
    """Train and judge every plan and seed."""
    tasks = load_tasks(args.tasks)
    trainer = Trainer(args.base, args.steps, args.batch_size, root)
    found = []
    for seed in args.seeds:
        for plan in args.plans:
            library = trainer(plan, seed, tasks)
            for embedding, grouping in ways(plan):
                plots = root / "plots" / f"{seed}-{plan.ranks}-{plan.start}-{embedding}" if args.plots else None
                row = {"seed": seed, "ranks": plan.ranks, "start": plan.start, "embedding": embedding}
                found.append({**row, "grouping": grouping, **judge(library, tasks, embedding, grouping, plots)})
        (root / "planted_truth.json").write_text(json.dumps(found, indent=2))
    return found


def table(found: list[dict]) -> str:
    """Means over the seeds, with the least, in Markdown."""
    figures = ("tasks", "families", "same_task", "other_tasks")
    lines = [
        "| ranks | start of A | embedding | ARI of tasks (least) | ARI of families (least) | cosine, same | other |",
        "|---|---|---|---|---|---|---|",
    ]
    keys = dict.fromkeys((row["ranks"], row["start"], row["embedding"], row["grouping"]) for row in found)
    for key in keys:
        rows = [row for row in found if (row["ranks"], row["start"], row["embedding"], row["grouping"]) == key]
        mean, least = ({name: f(row[name] for row in rows) for name in figures} for f in (_mean, min))
        way = key[2] if key[2] == "paper" else f"delta, {key[3]}"
        lines.append(
            f"| {key[0]} | {key[1]} | {way} | {mean['tasks']:.2f} ({least['tasks']:.2f}) | {mean['families']:.2f} "
            f"({least['families']:.2f}) | {mean['same_task']:.3f} | {mean['other_tasks']:.3f} |"
        )
    return "\n".join(lines)


def _mean(values) -> float:
    return float(np.mean(list(values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", help="only these tasks of the quickstart (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS), help="ranks and start of A")
    parser.add_argument("--steps", type=int, default=16, help="an adapter (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="rows a step (default: %(default)s)")
    parser.add_argument("--base", help="folder or Hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--output", type=Path, help="keeps adapters and planted_truth.json (default: a temporary one)")
    parser.add_argument("--plots", action="store_true", help="draw every clustering into --output")
    parser.add_argument("--smoke", action="store_true", help="a pico base, three tasks, one seed, two steps")
    args = parser.parse_args()
    silence_known_warnings()
    args.plans = [PLANS[name] for name in args.plans]
    with tempfile.TemporaryDirectory() as temporary:
        root = args.output or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        if args.smoke:
            from tests.building.data import base_in

            args.base, args.tasks = base_in(Path(temporary)), args.tasks or ["plural", "roman", "german_date"]
            args.seeds, args.steps = [0], 2
        print(table(run(args, root)))


if __name__ == "__main__":
    main()
