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
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

import numpy as np
from sklearn.metrics import adjusted_rand_score

from peft_arrow import AdapterLibrary, MBCClusterer
from peft_arrow.quickstart.task_list import load_tasks
from peft_arrow.quickstart.train import LoraTrainer, TrainSettings, train_adapters


# (rank, alpha) of a task's three versions, where they are to differ.
MIXED = ((4, 16), (8, 16), (16, 16))
EQUAL = ((8, 16),) * 3


@dataclass(frozen=True)
class Plan:
    """One clustering: which versions, and whether they start from one A.

    Args:
        ranks (`str`): `"mixed"` or `"equal"`.
        start (`str`): `"shared"` or `"own"`.
    """

    ranks: str
    start: str

    def settings(self, base: str | None, steps: int, seed: int) -> list[TrainSettings]:
        """Of the three versions; other seeds are other orders of the data and, with own starts, another A."""
        versions = MIXED if self.ranks == "mixed" else EQUAL
        first = TrainSettings(base=base, steps=steps)
        return [
            replace(first, rank=rank, alpha=alpha, seed=1000 * seed + version)
            for version, (rank, alpha) in enumerate(versions)
        ]


PLANS = [Plan(ranks, start) for ranks in ("mixed", "equal") for start in ("own", "shared")]


class OwnStartTrainer(LoraTrainer):
    """Trains every adapter from an A of its own: the seed depends on the task too."""

    def __call__(self, task, folder, settings, on_step) -> None:
        """Train with a seed made of the version's and the task's name."""
        seed = settings.seed + 10_000 * (1 + crc32(task.name.encode()) % 10_000)
        super().__call__(task, folder, replace(settings, seed=seed), on_step)


class SharedStartTrainer(LoraTrainer):
    """Trains from the A of the first version, whatever the seed of the data is, as the paper's experts do."""

    def __call__(self, task, folder, settings, on_step) -> None:
        """Train with the seed rounded down to the first version's, on rows of the version's own order."""
        rows = task.train_rows

        class Ordered:
            """The task, with the rows of a version."""

            name = task.name
            train_rows = staticmethod(lambda count: rows(count, seed=settings.seed % 1000))

        super().__call__(Ordered(), folder, replace(settings, seed=settings.seed // 1000 * 1000), on_step)


def train(plan: Plan, base: str | None, steps: int, seed: int, tasks: list, root: Path) -> AdapterLibrary:
    """All versions of all tasks, those that are missing trained now; names are `task-version`."""
    trainer = (SharedStartTrainer if plan.start == "shared" else OwnStartTrainer)(base)
    places = {}
    for version, settings in enumerate(plan.settings(base, steps, seed)):
        folder = root / f"seed-{seed}" / plan.start / f"rank-{settings.rank}-version-{version}"
        found = train_adapters(tasks, folder, settings, workers=1, train=trainer)
        places |= {f"{task}-{version}": path for task, path in found.items()}
    return AdapterLibrary.from_pretrained(places, base_model=base or "HuggingFaceTB/SmolLM2-135M-Instruct")


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
    found = []
    for seed in args.seeds:
        for plan in PLANS:
            library = train(plan, args.base, args.steps, seed, tasks, root)
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


def pico_base_folder(root: Path) -> str:
    """A Llama of two layers with the tokenizer of one token a character, saved."""
    from tests.pico import pico_base, pico_tokenizer

    pico_base().save_pretrained(root / "pico")
    pico_tokenizer().save_pretrained(root / "pico")
    return str(root / "pico")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", help="only these tasks of the quickstart (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=TrainSettings().steps, help="an adapter (default: %(default)s)")
    parser.add_argument("--base", help="folder or Hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--output", type=Path, help="keeps adapters and planted_truth.json (default: a temporary one)")
    parser.add_argument("--plots", action="store_true", help="draw every clustering into --output")
    parser.add_argument("--smoke", action="store_true", help="a pico base, three tasks, one seed, two steps")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = args.output or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        if args.smoke:
            args.base, args.tasks = pico_base_folder(Path(temporary)), args.tasks or ["plural", "roman", "german_date"]
            args.seeds, args.steps = [0], 2
        print(table(run(args, root)))


if __name__ == "__main__":
    main()
