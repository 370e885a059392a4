"""What one choice a request saves: decoding with routed experts, chosen for each token or once a request.

    python examples/benchmarks/sequence.py                 # SmolLM2-135M, random experts, some minutes
    python examples/benchmarks/sequence.py --smoke         # a pico base

First the outputs are compared: decoding after one choice must give what the one LoRA gives that the choice makes,
built here from the trace and run by plain PEFT. Then base, that plain LoRA, routing by token and routing by request
decode the same tokens in turn, and medians of the ratios to the plain LoRA are printed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_arrow import ArrowLoraModel
from peft_arrow.quickstart.base import load_base, silence_known_warnings


SCALING = 2.0


def random_adapters(base: torch.nn.Module, count: int, rank: int, folder: Path) -> list[Path]:
    """Adapters with random factors on all linear layers; the length of an update is that of a trained one, roughly."""
    folders = []
    for number in range(count):
        torch.manual_seed(number)
        config = LoraConfig(
            r=rank,
            lora_alpha=SCALING * rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            init_lora_weights=False,
        )
        model = get_peft_model(base, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data *= 0.05
        model.save_pretrained(folder / str(number))
        model.unload()
        folders.append(folder / str(number))
    return folders


def plain_lora(base: torch.nn.Module, trace: Any, folders: list[Path]) -> PeftModel:
    """The LoRA that the choice for the first row makes: chosen experts side by side, weights and scaling in B."""
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    factors = {}
    for module, routing in trace.steps[0].modules.items():
        index, weights = routing.top_k_index[0, 0].tolist(), routing.top_k_weights[0, 0].tolist()
        key = f"base_model.model.{module}.lora_{{}}.weight"
        lora_A = [tensors[expert][key.format("A")] for expert in index]
        lora_B = [w * SCALING * tensors[expert][key.format("B")] for expert, w in zip(index, weights, strict=True)]
        factors[module] = (torch.cat(lora_A), torch.cat(lora_B, dim=1))
    rank = len(next(iter(factors.values()))[0])
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(factors), task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    for module, (lora_A, lora_B) in factors.items():
        layer = base.get_submodule(module)
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = lora_A, lora_B
    return model


@torch.no_grad()
def decode(model: torch.nn.Module, prompt: torch.Tensor, answer: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Logits of prompt and answer, the answer token by token; and the seconds that the answer took."""
    out = model(input_ids=prompt, use_cache=True)
    found, cache = [out.logits], out.past_key_values
    model(input_ids=answer[:, :1], past_key_values=cache)  # the first step puts the chosen experts together
    cache.crop(-1)
    start = time.perf_counter()
    for token in answer.T:
        found.append(model(input_ids=token[:, None], past_key_values=cache).logits)
    return torch.cat(found, dim=1), time.perf_counter() - start


def compare(args: argparse.Namespace, count: int, folder: Path) -> None:
    """Check, time and print one number of experts."""
    base, tokenizer = load_base(args.base)
    folders = random_adapters(base, count, args.rank, folder)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, len(tokenizer) - 1, (args.batch, args.prompt + args.tokens), generator=generator)
    prompt, answer = ids[:, : args.prompt], ids[:, args.prompt :]
    copies = [load_base(args.base)[0] for _ in range(3)]
    by_token = ArrowLoraModel.from_pretrained(copies[0], folders, top_k=args.top_k)
    by_request = ArrowLoraModel.from_pretrained(copies[1], folders, top_k=args.top_k, granularity="sequence")
    with by_request.trace_routing() as trace:
        logits, _ = decode(by_request, prompt, answer)
    plain = plain_lora(copies[2], trace, folders)
    expected, _ = decode(plain, prompt[:1], answer[:1])
    difference = float((logits[:1] - expected).abs().max() / expected.abs().max())
    assert difference < 1e-4, f"one choice a request differs from its LoRA by {difference:.1e} of the largest logit"
    sides: dict[str, Callable] = {
        "base": lambda: decode(base, prompt, answer)[1],
        "plain LoRA": lambda: decode(plain, prompt, answer)[1],
        "by token": lambda: decode(by_token, prompt, answer)[1],
        "by request": lambda: decode(by_request, prompt, answer)[1],
    }
    rounds = [{name: side() for name, side in sides.items()} for _ in range(args.repeats)]
    ratios = {name: statistics.median(r[name] / r["plain LoRA"] for r in rounds) for name in sides}
    milliseconds = {name: 1000 * statistics.median(r[name] for r in rounds) / args.tokens for name in sides}
    told = "   ".join(f"{name} {milliseconds[name]:.1f} ms ({ratios[name]:.2f})" for name in sides)
    print(
        f"E={count:<4} rank of the LoRA {args.top_k * args.rank:<4} {told}   largest difference {difference:.0e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="folder or Hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32], help="default: %(default)s")
    parser.add_argument("--rank", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--top-k", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--prompt", type=int, default=64, help="tokens (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="decoded (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--smoke", action="store_true", help="a pico base, few tokens")
    args = parser.parse_args()
    silence_known_warnings()
    with tempfile.TemporaryDirectory() as temporary:
        if args.smoke:
            from tests.building.data import base_in

            args.base, args.experts = base_in(Path(temporary)), [6]
            args.prompt, args.tokens, args.repeats = 6, 3, 2
        print("milliseconds a token while decoding, and in brackets the median ratio to the plain LoRA")
        for count in args.experts:
            compare(args, count, Path(temporary) / f"experts-{count}")


if __name__ == "__main__":
    main()
