"""What each kind of library is worth: held-out loss of private, shared, MBC and random-task experts, equal budgets.

    python examples/benchmarks/library_kinds.py tasks/*.jsonl --output kinds      # an hour or two on two cores
    python examples/benchmarks/library_kinds.py tasks/*.jsonl --output kinds --only private shared
    python examples/benchmarks/library_kinds.py --smoke                           # a pico base and made-up tasks

Each file is a task: rows of `instruction`, `input` and `output`, with a `split` of "train" or "eval". Every kind of
library is built by `train_library` with the same number of optimizer steps in all. Then the eval rows are judged

    with its own expert     the expert that was trained on the task: nothing is chosen, so the kinds can be compared
    with routing            Arrow and uniform over all experts of the library, for `private` and `mbc`

beside the base alone. `random` is repeated with other partitions. What was judged is kept in --output and not judged
again; several processes may work on different kinds at the same time, and a last call without --only prints the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from sklearn.metrics import adjusted_rand_score
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from peft_arrow import AdapterLibrary, ArrowLoraModel, MBCClusterer, train_library
from peft_arrow.evaluation.statistics import paired_difference
from peft_arrow.prompts import instruction_prompt
from peft_arrow.quickstart.base import load_base, silence_known_warnings


Row = Mapping[str, str]
Losses = dict[str, list[float]]
ROUTED = ("private", "mbc")
TOP_K = 4


class Bench:
    """The base, the tasks, and the folder in which libraries and losses are kept."""

    def __init__(self, args: argparse.Namespace, root: Path) -> None:
        self.args, self.root = args, root
        self.model, self.tokenizer = load_base(args.base)
        self.model.to(getattr(torch, args.dtype))
        self.files = {Path(file).stem: Path(file) for file in args.files}
        self.eval_rows = {task: read_rows(path, "eval")[: args.rows] for task, path in self.files.items()}
        self.category = {task: read_rows(path, "eval")[0].get("category", task) for task, path in self.files.items()}

    def library(self, kind: str, seed: int) -> AdapterLibrary:
        """The library of a kind, trained now if it is not there."""
        recipe = {"per_device_train_batch_size": self.args.batch_size, "gradient_accumulation_steps": 1}
        return train_library(
            self.model,
            self.files,
            tokenizer=self.tokenizer,
            kind=kind,
            n_clusters=self.args.clusters,
            steps=self.args.steps,
            seed=seed,
            sft_config={**recipe, "learning_rate": self.args.lr, "max_length": 256},
            output_dir=self.root / f"{kind}-{seed}",
        )

    def judged(self, name: str, judge: Callable[[], Losses]) -> Losses:
        """The losses of a method, as they were kept, or computed now."""
        file = self.root / f"losses-{name}.json"
        if not file.exists():
            file.write_text(json.dumps(judge()))
        return json.loads(file.read_text())

    def row_losses(self, model: torch.nn.Module, choose: Callable[[str], None], name: str) -> Losses:
        """Nats per token of each eval row; `choose` sets the model up for a task."""
        found = {}
        for task, rows in tqdm(self.eval_rows.items(), desc=f"judging {name}", unit="task"):
            choose(task)
            found[task] = completion_losses(model, self.tokenizer, rows)
        return found


def read_rows(path: Path, split: str) -> list[Row]:
    """The rows of one split."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["split"] == split]


@torch.no_grad()
def completion_losses(model: torch.nn.Module, tokenizer, rows: Sequence[Row], batch_size: int = 10) -> list[float]:
    """Nats per token of the completion, the end token included, for each row; similar lengths share a batch."""
    encoded = []
    for row in rows:
        asked = instruction_prompt(row["instruction"], row.get("input"))
        prompt = tokenizer(asked)["input_ids"]
        both = tokenizer(asked + row["output"])["input_ids"] + [tokenizer.eos_token_id]
        encoded.append((len(prompt), torch.tensor(both)))
    order = sorted(range(len(rows)), key=lambda place: len(encoded[place][1]))
    losses = [0.0] * len(rows)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids = pad_sequence([encoded[place][1] for place in chosen], batch_first=True, padding_value=0)
        lengths = torch.tensor([len(encoded[place][1]) for place in chosen])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1].float()
        nats = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        for line, place in enumerate(chosen):
            losses[place] = nats[line, encoded[place][0] - 1 : lengths[line] - 1].mean().item()
    return losses


def judge_kind(bench: Bench, kind: str, seed: int) -> None:
    """Build one library, judge each task with its own expert, and with routing where that is asked for."""
    library = bench.library(kind, seed)
    expert_of = {task: expert for expert, tasks in library.notes.made["groups"].items() for task in tasks}
    folder = bench.root / f"{kind}-{seed}" / "experts"
    bench.model.requires_grad_(False)

    def own() -> Losses:
        first, *others = library
        plain = PeftModel.from_pretrained(bench.model, folder / first, adapter_name=first).eval()
        for name in others:
            plain.load_adapter(folder / name, adapter_name=name)
        try:
            return bench.row_losses(plain, lambda task: plain.set_adapter(expert_of[task]), f"{kind}-{seed}")
        finally:
            plain.unload()

    def routed(router: str) -> Losses:
        options = {"top_k": min(TOP_K, len(library))} if router == "arrow" else {}
        model = ArrowLoraModel.from_pretrained(bench.model, library).eval()
        model.set_router(router, **options)
        try:
            return bench.row_losses(model, lambda task: None, f"{kind}-{seed}, {router}")
        finally:
            model.unload()

    bench.judged(f"{kind}-{seed}", own)
    for router in ("arrow", "uniform") if kind in ROUTED and bench.args.route else ():
        bench.judged(f"{kind}-{seed}-{router}", lambda router=router: routed(router))
    if kind == "mbc":
        draw_clusters(bench, seed)


def draw_clusters(bench: Bench, seed: int) -> None:
    """The pictures of the private adapters that were clustered, and how well the clusters fit the categories."""
    folder = bench.root / f"mbc-{seed}-training" / "private"
    private = AdapterLibrary.from_pretrained({task: folder / task for task in bench.files}, bench.model.name_or_path)
    told = {}
    for embedding in ("delta", "paper"):
        clusterer = MBCClusterer(bench.args.clusters, embedding=embedding, random_state=seed).fit(private)
        truth = [bench.category[task] for task in clusterer.names_]
        told[embedding] = {
            "clusters": clusterer.clusters_,
            "silhouette": clusterer.silhouette_,
            "ari_of_categories": float(adjusted_rand_score(truth, clusterer.labels_)),
        }
        clusterer.plot(bench.root / f"pictures-{seed}" / embedding)
    (bench.root / f"clusters-{seed}.json").write_text(json.dumps(told, indent=1))


def task_means(losses: Losses) -> dict[str, float]:
    return {task: statistics.fmean(rows) for task, rows in losses.items()}


def averaged(runs: Sequence[Losses]) -> Losses:
    """The mean over runs of each row's loss."""
    return {
        task: [statistics.fmean(row) for row in zip(*(run[task] for run in runs), strict=True)] for task in runs[0]
    }


def report(bench: Bench) -> str:
    """Tables in Markdown: tasks down, methods across; then `mbc` against each other."""
    found: dict[str, list[Losses]] = {}
    for file in sorted(bench.root.glob("losses-*.json")):
        kind, _, rest = file.stem.removeprefix("losses-").partition("-")
        router = rest.partition("-")[2]
        found.setdefault(f"{kind}, {router}" if router else kind, []).append(json.loads(file.read_text()))
    own = ["base", "private", "shared", "random", "mbc"]
    order = own + [f"{kind}, {router}" for kind in ROUTED for router in ("uniform", "arrow")]
    runs = {name: found[name] for name in order if name in found}
    columns = {name: task_means(averaged(several)) for name, several in runs.items()}
    lines = ["| task | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {task} | " + " | ".join(f"{c[task]:.2f}" for c in columns.values()) + " |" for task in bench.files]
    means = []
    for several in runs.values():
        each = [statistics.fmean(task_means(run).values()) for run in several]
        means.append(f"{statistics.fmean(each):.3f}" + (f" ± {statistics.stdev(each):.3f}" if len(each) > 1 else ""))
    lines += ["| **mean** | " + " | ".join(means) + " |", ""]
    for name, several in runs.items():
        if "mbc" in runs and name != "mbc":
            gap = paired_difference(averaged(runs["mbc"]), averaged(several))
            lines.append(f"mbc minus {name}: {gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]")
    return "\n".join([*lines, "", *told_of_clusters(bench)])


def told_of_clusters(bench: Bench) -> list[str]:
    """What the clusters are, and the budgets."""
    lines = []
    for file in sorted(bench.root.glob("clusters-*.json")):
        for embedding, told in json.loads(file.read_text()).items():
            groups = "; ".join(f"{name}: {', '.join(tasks)}" for name, tasks in told["clusters"].items())
            ari, clear = told["ari_of_categories"], told["silhouette"]
            lines.append(f"{file.stem}, {embedding}: ARI of categories {ari:.2f}, silhouette {clear:.3f}; {groups}")
    for file in sorted(bench.root.glob("*/library.json")):
        made = json.loads(file.read_text())["made"]
        lines.append(f"{file.parent.name}: {made['steps']} steps, {made['tokens']} tokens")
    return lines


def made_up_tasks(root: Path) -> list[str]:
    """Four tasks of two categories, for --smoke."""
    answers = {"plurals": "{}s", "doubles": "{0}{0}", "upper": "{0}!", "twice": "{0} {0}"}
    for number, (task, answer) in enumerate(answers.items()):
        rows = [
            {
                "instruction": f"{task}:",
                "input": f"word{place}",
                "output": answer.format(f"word{place}"),
                "category": "words" if number < 2 else "signs",
                "split": "train" if place < 8 else "eval",
            }
            for place in range(12)
        ]
        (root / f"{task}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return [str(root / f"{task}.jsonl") for task in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="one .jsonl file a task")
    parser.add_argument("--base", help="folder or Hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--clusters", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the base")
    parser.add_argument("--batch-size", type=int, default=4, help="rows a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=24, help="a task brings into every budget (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=40, help="eval rows a task (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="partitions of `random` (default: %(default)s)")
    parser.add_argument("--only", nargs="+", help="build and judge only these: base, private, random-1 ...")
    parser.add_argument("--no-route", dest="route", action="store_false", help="judge own experts only")
    parser.add_argument("--output", type=Path, help="keeps everything (default: a temporary folder)")
    parser.add_argument("--smoke", action="store_true", help="a pico base, made-up tasks, few steps")
    args = parser.parse_args()
    if not args.files and not args.smoke:
        parser.error("name one file a task, or pass --smoke")
    silence_known_warnings()
    with tempfile.TemporaryDirectory() as temporary:
        root = args.output or Path(temporary) / "kinds"
        root.mkdir(parents=True, exist_ok=True)
        if args.smoke:
            from tests.building.data import base_in

            args.files, args.base = made_up_tasks(Path(temporary)), base_in(Path(temporary))
            args.steps, args.clusters, args.seeds = 5, 2, 2
        bench = Bench(args, root)
        runs = ["private-0", "shared-0", "mbc-0", *(f"random-{seed}" for seed in range(args.seeds))]
        wanted = args.only or ["base", *runs]
        if "base" in wanted:
            bench.judged("base-0", lambda: bench.row_losses(bench.model, lambda task: None, "base"))
        for name in runs:
            if name in wanted:
                kind, _, seed = name.rpartition("-")
                judge_kind(bench, kind, int(seed))
        told = report(bench)
        (root / "report.md").write_text(told + "\n")
        print(told)


if __name__ == "__main__":
    main()
