"""Time and memory to make a routed model of many LoRA adapters, beside PEFT's loop over `load_adapter`.

    python examples/benchmarks/loading.py                      # SmolLM2-135M, up to 200 adapters; many minutes
    python examples/benchmarks/loading.py --output results     # also writes results/loading.json and loading.png
    python examples/benchmarks/loading.py --smoke              # a Llama of two layers and a handful of adapters

The adapters have random factors, rank 8 and all linear modules of every layer. First one of them is compared, as an
expert of a routed model, with plain PEFT. Then each measurement runs in a new process: it loads the base, loads one
adapter into a small model (for the first-time costs of the libraries) and then

    peft-arrow           ArrowLoraModel.from_pretrained(base, folders), then model.build_prototypes()
    PEFT                 PeftModel.from_pretrained(base, folders[0]), then model.load_adapter for each further folder
    PEFT low_cpu_mem     the same with low_cpu_mem_usage=True

and at last the first token of an answer to 16 tokens. For that PEFT's model gets the router that `create_arrow_model`
adds after the same loop; routed, it is compared with ours before, with the same prototypes.

The base is in memory before the clock starts, and the files are in the page cache: they have just been written.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from safetensors.torch import save_file
from sides.first_token import check_routed, first_token, route_loaded, told_first_token
from sides.machine import forget_peak, machine, resident_bytes
from torch import nn
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from peft_arrow import ArrowLoraModel
from peft_arrow.quickstart.base import load_base


RANK, TOP_K = 8, 4
PICO = "pico"
OURS, PEFT, PEFT_LOW = "peft-arrow", "PEFT", "PEFT low_cpu_mem"


def make_base(base: str | None) -> nn.Module:
    """SmolLM2-135M in float32, the base of that name, or for `"pico"` a Llama of two layers."""
    if base != PICO:
        return load_base(base)[0]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


def write_adapters(model: nn.Module, root: Path, count: int) -> list[str]:
    """Adapter folders as PEFT writes them, with random factors that change the base's logits visibly."""
    modules = {
        name: module.weight.shape
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
    }
    folders = []
    for seed in range(count):
        folder = root / f"adapter-{seed}"
        folder.mkdir(parents=True)
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, (out_features, in_features) in modules.items():
            lora_A = torch.randn(RANK, in_features, generator=generator) / in_features**0.5
            tensors[f"base_model.model.{name}.lora_A.weight"] = lora_A
            tensors[f"base_model.model.{name}.lora_B.weight"] = (
                torch.randn(out_features, RANK, generator=generator) * 0.02
            )
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config))
        folders.append(str(folder))
    return folders


def load_with_peft(base: nn.Module, folders: list[str], **options) -> PeftModel:
    """The loop that PEFT's documentation shows."""
    model = PeftModel.from_pretrained(base, folders[0], adapter_name="adapter-0", **options)
    for i, folder in enumerate(folders[1:], start=1):
        model.load_adapter(folder, adapter_name=f"adapter-{i}", **options)
    return model


LOADERS = {
    OURS: ArrowLoraModel.from_pretrained,
    PEFT: load_with_peft,
    PEFT_LOW: lambda base, folders: load_with_peft(base, folders, low_cpu_mem_usage=True),
}


@torch.no_grad()
def check_same(base: str | None, folders: list[str]) -> float:
    """Pin a routed model to each of its experts in turn: the logits are those of plain PEFT with that adapter.

    And routed, it gives what PEFT's Arrow gives.

    Returns:
        The largest difference of the logits, relative to the largest change that the adapter, or routing, makes.
    """
    ids = torch.randint(0, 100, (1, 16), generator=torch.Generator().manual_seed(0))
    without = make_base(base)(ids).logits
    routed = ArrowLoraModel.from_pretrained(make_base(base), folders)
    largest = 0.0
    for name, folder in zip(routed.expert_names, folders, strict=True):
        expected = PeftModel.from_pretrained(make_base(base), folder).eval()(ids).logits
        effect = (expected - without).abs().max().item()
        assert effect > 1e-2, "the adapters do nothing, so nothing would be compared"
        largest = max(largest, (routed(ids, adapter_names=[name]).logits - expected).abs().max().item() / effect)
    assert largest < 1e-3, f"expert and adapter differ: {largest:.1e} of the adapter's effect"
    peft = route_loaded(load_with_peft(make_base(base), folders), TOP_K)
    return max(largest, check_routed(routed, peft, ids, without))


def measure(method: str, base: str | None, folders: list[str], warm_up: list[str]) -> dict[str, float]:
    """Seconds and peak memory of one load, in the process that calls this.

    Returns:
        `seconds` until the loader returned, `ready_seconds` with the prototypes built (for PEFT the same), and the
        peaks of both above what was resident before, in bytes; `first_token_seconds` with the first token generated.
    """
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    load = LOADERS[method]
    ids = torch.randint(0, 100, (1, 16), generator=torch.Generator().manual_seed(0))
    answer(method, load(make_base(PICO), warm_up), ids)
    model = make_base(base)
    gc.collect()
    before = resident_bytes("VmRSS")
    forget_peak()
    start = time.perf_counter()
    loaded = load(model, folders)
    result = {"seconds": time.perf_counter() - start, "peak_bytes": resident_bytes("VmHWM") - before}
    if method == OURS:
        loaded.build_prototypes()
    result["ready_seconds"] = time.perf_counter() - start
    result["ready_peak_bytes"] = resident_bytes("VmHWM") - before
    answer(method, loaded, ids)
    return {**result, "first_token_seconds": time.perf_counter() - start}


def answer(method: str, loaded: PeftModel, ids: torch.Tensor) -> int:
    """The first token of a loaded model; PEFT's gets its router first."""
    return first_token(loaded if method == OURS else route_loaded(loaded, TOP_K), ids)


def in_new_process(*arguments) -> dict[str, float]:
    """`measure` in a process of its own, which forks from nothing that holds a model."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as executor:
        return executor.submit(measure, *arguments).result()


def run(args: argparse.Namespace, root: Path) -> list[dict]:
    """All measurements, the methods in turn for each count, and that `args.repeats` times."""
    model = make_base(args.base)
    folders = write_adapters(model, root / "adapters", max(args.counts + args.peft_counts))
    warm_up = write_adapters(make_base(PICO), root / "warm-up", 1)
    del model
    print(f"an expert and plain PEFT differ by {check_same(args.base, folders[:2]):.0e} of the adapter's effect")
    weights = os.path.getsize(Path(folders[0]) / "adapter_model.safetensors")
    plan = [
        (count, method)
        for _ in range(args.repeats)
        for count in sorted({*args.counts, *args.peft_counts})
        for method in LOADERS
        if count in (args.counts if method == OURS else args.peft_counts)
    ]
    found = []
    for count, method in tqdm(plan, desc="Measuring"):
        result = in_new_process(method, args.base, folders[:count], warm_up)
        found.append({"method": method, "count": count, "weights_bytes": count * weights, **result})
    return found


def medians(found: list[dict]) -> dict[tuple[str, int], dict]:
    """(method, count) -> the median of each figure over the repeats."""
    groups: dict[tuple[str, int], list[dict]] = {}
    for row in found:
        groups.setdefault((row["method"], row["count"]), []).append(row)
    return {
        key: {name: statistics.median(row[name] for row in rows) for name in rows[0] if name != "method"}
        for key, rows in groups.items()
    }


def table(middle: dict[tuple[str, int], dict]) -> str:
    """One line a method and count, in Markdown."""
    lines = [
        "| adapters | method | seconds | ready, seconds | ms an adapter | times peft-arrow | peak / weights |",
        "|---|---|---|---|---|---|---|",
    ]
    for (method, count), row in sorted(middle.items(), key=lambda item: item[0][1]):
        ours = middle.get((OURS, count))
        factor = f"{row['ready_seconds'] / ours['ready_seconds']:.1f}" if ours and method != OURS else ""
        peak = row["ready_peak_bytes"] / row["weights_bytes"]
        lines.append(
            f"| {count} | {method} | {row['seconds']:.1f} | {row['ready_seconds']:.1f} "
            f"| {1000 * row['ready_seconds'] / count:.0f} | {factor} | {peak:.2f} |"
        )
    return "\n".join(lines)


def first_tokens(middle: dict[tuple[str, int], dict], is_issue_setting: bool) -> list[str]:
    """A line for each count: seconds from folders to the first token, and the ratio with its target."""
    lines = []
    for count in sorted({count for _, count in middle}):
        seconds = {
            method: middle[method, count]["first_token_seconds"] for method in LOADERS if (method, count) in middle
        }
        lines.append(told_first_token(count, seconds, is_issue_setting))
    return lines


def growth(middle: dict[tuple[str, int], dict]) -> list[str]:
    """How the time for one adapter changes from the fewest to the most; 1 or less is linear growth."""
    lines = []
    for method in LOADERS:
        counts = sorted(count for name, count in middle if name == method)
        first, last = (1000 * middle[method, count]["ready_seconds"] / count for count in (counts[0], counts[-1]))
        lines.append(
            f"{method}: {first:.0f} ms an adapter at {counts[0]}, {last:.0f} ms at {counts[-1]} "
            f"({last / first:.2f} times)"
        )
    return lines


def plot(middle: dict[tuple[str, int], dict], path: Path) -> None:
    """Seconds until the model is ready over the number of adapters, both axes logarithmic."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install 'peft-arrow[viz]'") from error
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for method in LOADERS:
        counts = sorted(count for name, count in middle if name == method)
        axes.plot(counts, [middle[method, count]["ready_seconds"] for count in counts], marker="o", label=method)
    axes.set(xlabel="adapters", ylabel="seconds until ready", xscale="log", yscale="log")
    counts = sorted({count for _, count in middle})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[25, 50, 100, 200], help="adapters for peft-arrow")
    parser.add_argument("--peft-counts", type=int, nargs="+", default=[25, 50, 100], help="adapters for PEFT")
    parser.add_argument("--repeats", type=int, default=1, help="measurements of each; the table has their median")
    parser.add_argument("--base", help="a folder or Hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--output", type=Path, help="folder for loading.json and loading.png (default: none written)")
    parser.add_argument("--smoke", action="store_true", help="a pico base, 2 and 4 adapters, to see that it runs")
    args = parser.parse_args()
    if args.smoke:
        args.counts, args.peft_counts, args.base = [2, 4], [4], PICO
    with tempfile.TemporaryDirectory() as temporary:
        found = run(args, Path(temporary))
    middle, facts = medians(found), machine()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(table(middle))
    print("\n".join([*growth(middle), *first_tokens(middle, args.base is None)]))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "loading.json").write_text(json.dumps({"machine": facts, "measured": found}, indent=2))
        plot(middle, args.output / "loading.png")


if __name__ == "__main__":
    main()
