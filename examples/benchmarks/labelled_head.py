"""A training step on a CPU with the language-model head at labelled positions only, against TRL's at all positions.

    python examples/benchmarks/labelled_head.py            # SmolLM2-135M, two minutes
    python examples/benchmarks/labelled_head.py --smoke    # two layers of it, one step each

Both ways first give the same losses, within rounding; then steps alternate, and the ratio of medians is printed. Rows
are instructions of about 80 tokens with answers of a few.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from peft_arrow import train_adapter
from peft_arrow.quickstart.base import load_base, silence_known_warnings
from peft_arrow.training import fitting


WORDS = "the river runs past the old mill and under a stone bridge where children fish in summer".split()
ROWS = [
    {
        "prompt": f"Say how many letters the word has. {' '.join(WORDS * 4)} Word: {word}\n",
        "completion": str(len(word)),
    }
    for word in WORDS
]
TOLERANCE = 0.02


def losses_and_seconds(model, tokenizer, folder: Path, steps: int) -> tuple[list[float], float]:
    """The logged losses of a short training, and its seconds a step."""
    started = time.perf_counter()
    config = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_length": 256}
    ref = train_adapter(
        model, ROWS, output_dir=folder, steps=steps, tokenizer=tokenizer, sft_config=config, progress=False
    )
    seconds = (time.perf_counter() - started) / steps
    return json.loads((Path(ref.source) / "training.json").read_text())["losses"], seconds


def main() -> None:
    """Compare, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of each way (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="of each round (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="of the base (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="two layers, one round of two steps")
    arguments = parser.parse_args()
    rounds, steps = (1, 2) if arguments.smoke else (arguments.rounds, arguments.steps)
    silence_known_warnings()
    model, tokenizer = load_base(None, getattr(torch, arguments.dtype))
    if arguments.smoke:
        model.model.layers = model.model.layers[:2]
        model.config.num_hidden_layers = 2
    ours, found = fitting.scoring_labels_only, {"labelled": [], "all": []}
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(rounds):
            losses = {}
            for way in found:
                fitting.scoring_labels_only = ours if way == "labelled" else contextlib.nullcontext
                losses[way], seconds = losses_and_seconds(model, tokenizer, Path(temporary, f"{way}{number}"), steps)
                found[way].append(seconds)
            apart = max(abs(a - b) for a, b in zip(losses["labelled"], losses["all"], strict=True))
            assert apart < TOLERANCE, f"the losses differ by {apart}"
    fitting.scoring_labels_only = ours
    medians = {way: statistics.median(seconds) for way, seconds in found.items()}
    print(f"the same losses within {apart:.1e}; {arguments.dtype}, {torch.get_num_threads()} threads, {rounds} rounds")
    for way, seconds in medians.items():
        print(f"{way:10} {seconds:.2f} s a step, set-up included")
    print(f"all / labelled: {medians['all'] / medians['labelled']:.2f}")


if __name__ == "__main__":
    main()
