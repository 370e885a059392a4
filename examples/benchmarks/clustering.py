"""Time and peak memory to compare many LoRA adapters of a 7B model, beside flattening all their weights.

    python examples/benchmarks/clustering.py                       # 100, 300 and 1,000 adapters; an hour or more
    python examples/benchmarks/clustering.py --output results      # also writes results/clustering.json
    python examples/benchmarks/clustering.py --smoke               # a few adapters of width 64

The adapters are of 32 layers, q, k, v and o, d = 4096 and rank 8, in bf16: 16.8 MB each, 16.8 GB for 1,000, which are
written to a temporary folder (TMPDIR) and read from there. They are made from a seed, in ten families. Each
measurement runs in a new process:

    delta, exact      MBCClusterer(10, pairs="exact").fit(library)
    delta, sketch     MBCClusterer(10, pairs="sketch").fit(library)
    paper, streamed   MBCClusterer(10, embedding="paper").fit(library)
    flatten           the paper's recipe as it is published: one matrix of all adapters and parameters, in float32

Peaks are resident memory above what it was before the fit, and include pages of files that are mapped. Flattening is
measured where the matrix, a copy, and what the truncated SVD works with fit in the free memory of the machine.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.pairwise import cosine_similarity
from tqdm.auto import tqdm

from peft_arrow import AdapterLibrary, MBCClusterer


FAMILIES = 10
RANK = 8
FLATTEN = "flatten"
METHODS = {
    "delta, exact": {"pairs": "exact"},
    "delta, sketch": {"pairs": "sketch"},
    "paper, streamed": {"embedding": "paper"},
    FLATTEN: None,
}


def write_adapters(root: Path, count: int, layers: int, width: int) -> list[str]:
    """Adapter folders in bf16: one start of A for all, a B for each family, and noise of the same size on both."""
    modules = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(layers) for name in "qkvo"]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "base_model_name_or_path": "me/7b",
    }

    def draw(seed: int) -> torch.Tensor:
        return torch.randn(len(modules), 2, RANK * width, generator=torch.Generator().manual_seed(seed))

    centres = [draw(1_000_000 + family).bfloat16() for family in range(FAMILIES)]
    start = draw(2_000_000)[:, 0]
    folders = []
    for seed in tqdm(range(count), desc="Writing"):
        numbers = draw(seed)
        tensors = {}
        for place, module in enumerate(modules):
            lora_A = (start[place] + 0.3 * numbers[place, 0]).view(RANK, width)
            lora_B = (centres[seed % FAMILIES][place, 1] + numbers[place, 1]).view(width, RANK)
            tensors[f"base_model.model.{module}.lora_A.weight"] = lora_A.bfloat16()
            tensors[f"base_model.model.{module}.lora_B.weight"] = lora_B.bfloat16()
        folder = root / f"adapter-{seed:05d}"
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config))
        folders.append(str(folder))
    return folders


def flatten_everything(library: AdapterLibrary) -> np.ndarray:
    """The recipe as it is published, on one matrix (adapters, parameters)."""
    rows = None
    for place, name in enumerate(sorted(library)):
        tensors = library[name].tensors
        row = torch.cat([tensors[key].float().flatten() for key in sorted(tensors)]).numpy()
        row[abs(row) <= np.quantile(abs(row), 0.5)] = 0
        rows = np.empty((len(library), len(row)), dtype=np.float32) if rows is None else rows
        rows[place] = row
    embedded = TruncatedSVD(min(64, rows.shape[1]), n_iter=5, random_state=42).fit_transform(rows)
    similarity = cosine_similarity(embedded / np.linalg.norm(embedded, axis=1, keepdims=True))
    return KMeans(FAMILIES, n_init=10, random_state=42).fit_predict(similarity)


def resident_bytes(field: str) -> int:
    """`VmRSS`, what is resident now, or `VmHWM`, its peak since it was last forgotten; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def measure(method: str, folders: list[str]) -> dict[str, float]:
    """Seconds, peak memory and adjusted Rand index of one fit, in the process that calls this."""
    MBCClusterer(2).fit(np.eye(4))
    library = AdapterLibrary.from_pretrained(folders)
    gc.collect()
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    if method == FLATTEN:
        labels = flatten_everything(library)
    else:
        labels = MBCClusterer(FAMILIES, **METHODS[method]).fit(library).labels_
    seconds = time.perf_counter() - start
    truth = [place % FAMILIES for place in range(len(folders))]
    peak = resident_bytes("VmHWM") - before
    return {"seconds": seconds, "peak_bytes": peak, "ari": float(adjusted_rand_score(truth, labels))}


def fits(method: str, count: int, parameters: int) -> bool:
    """Whether flattening so many adapters, with the copy that the SVD makes, fits in what memory is free."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    numbers = 2 * count + 3 * 74  # the matrix and a copy; the 64 + 10 directions of the SVD, three times
    return method != FLATTEN or 4 * numbers * parameters < 0.9 * free


def one_process() -> ProcessPoolExecutor:
    """A process that is not started before it has work: each measurement has a fresh one, but for a smoke run's."""
    return ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))


def run(args: argparse.Namespace, root: Path) -> list[dict]:
    """All measurements; what does not fit is a row without figures."""
    parameters = args.layers * 4 * 2 * RANK * args.width
    needed, free = 2 * parameters * max(args.counts), shutil.disk_usage(root).free
    if needed > 0.9 * free:
        raise SystemExit(f"{needed / 1e9:.1f} GB of adapters do not fit in {root}, which has {free / 1e9:.1f} GB free")
    folders = write_adapters(root, max(args.counts), args.layers, args.width)
    found = []
    with one_process() as shared:
        for count, method in itertools.product(args.counts, args.methods):
            row = {"method": method, "count": count, "parameters": parameters}
            if fits(method, count, parameters):
                with nullcontext(shared) if args.smoke else one_process() as executor:
                    row |= executor.submit(measure, method, folders[:count]).result()
            found.append(row)
            print(line(row), flush=True)
    return found


def line(row: dict) -> str:
    """One row of the table, in Markdown."""
    if "seconds" not in row:
        return f"| {row['count']} | {row['method']} | does not fit in memory | | | |"
    each = 1000 * row["seconds"] / row["count"]
    peak = row["peak_bytes"] / 2**30
    return f"| {row['count']} | {row['method']} | {row['seconds']:.1f} | {each:.0f} | {peak:.2f} | {row['ari']:.2f} |"


def growth(found: list[dict]) -> list[str]:
    """How time grows from the fewest adapters to the most: the exponent p of seconds ~ N^p."""
    lines = []
    for method in METHODS:
        rows = [row for row in found if row["method"] == method and "seconds" in row]
        if len(rows) > 1:
            ratio = rows[-1]["seconds"] / rows[0]["seconds"]
            power = np.log(ratio) / np.log(rows[-1]["count"] / rows[0]["count"])
            lines.append(f"{method}: seconds grow as N^{power:.2f} from {rows[0]['count']} to {rows[-1]['count']}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--output", type=Path, help="folder for clustering.json (default: none written)")
    parser.add_argument("--smoke", action="store_true", help="20 and 40 adapters of width 64, in one process")
    args = parser.parse_args()
    if args.smoke:
        args.counts, args.layers, args.width = [20, 40], 2, 64
    facts = {"machine": platform.platform(), "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print("| adapters | method | seconds | ms an adapter | peak, GiB | ARI |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        found = run(args, Path(temporary))
    print("\n".join(growth(found)))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "clustering.json").write_text(json.dumps({"machine": facts, "measured": found}, indent=2))


if __name__ == "__main__":
    main()
