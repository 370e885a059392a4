"""The experts that all sides have: random factors, or a few trained adapters multiplied."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .bases import linear_modules


PREFIX = "base_model.model."


@dataclass(frozen=True)
class Experts:
    """What E experts are made of; their factors are made module by module and not kept.

    Args:
        count (`int`): E.
        rank (`int`): R, of every expert.
        scaling (`float`): alpha / rank, of every expert.
        sources (`tuple[Mapping[str, torch.Tensor], ...]`):
            Tensors of trained adapters, which are the first experts; further ones are copies of them with noise on
            both factors. Without any, all factors are random.
        noise (`float`): standard deviation of that noise, relative to the root mean square of the factor.
        within (`str`): what stands before the names of the modules in the sources.
    """

    count: int
    rank: int
    scaling: float = 2.0
    sources: tuple[Mapping[str, torch.Tensor], ...] = ()
    noise: float = 0.3
    within: str = ""

    @property
    def kind(self) -> str:
        """`"trained"` or `"random"`."""
        return "trained" if self.sources else "random"

    def factors(self, module: str, linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
        """lora_A (E, R, I) and lora_B (E, O, R) of a module, the same at every call."""
        device, dtype = linear.weight.device, linear.weight.dtype
        generator = torch.Generator(device).manual_seed(crc32(f"{self.within}{module}".encode()))
        (out_features, in_features), count = linear.weight.shape, self.count
        shapes = ((count, self.rank, in_features), (count, out_features, self.rank))
        noise = [torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes]
        if not self.sources:
            return noise[0].div_(in_features**0.5), noise[1].mul_(0.02)
        copies = torch.arange(count) % len(self.sources)
        found = []
        for half, random in zip("AB", noise, strict=True):
            known = [source[f"{PREFIX}{self.within}{module}.lora_{half}.weight"] for source in self.sources]
            trained = torch.stack(known).to(device, dtype)
            size = self.noise * trained.square().mean(dim=(1, 2), keepdim=True).sqrt()
            random[: len(known)] = 0
            found.append(random.mul_(size[copies]).add_(trained[copies]))
        return found[0], found[1]


def random_experts(count: int, rank: int) -> Experts:
    """Experts with random factors, whose updates are visible in the logits."""
    return Experts(count, rank)


def trained_experts(count: int, folders: Sequence[Path], noise: float) -> Experts:
    """`count` experts of the adapters in these folders; a folder is an adapter, or a library with `experts/<name>/`.

    Raises:
        ValueError: there is no adapter, or they differ in rank or scaling.
    """
    places = [place for folder in folders for place in sorted(folder.glob("experts/*")) or [folder]]
    configs = [json.loads((place / "adapter_config.json").read_text()) for place in places]
    shapes = {(config["r"], config["lora_alpha"] / config["r"]) for config in configs}
    if len(shapes) != 1:
        raise ValueError(f"--adapters must be of one rank and alpha; found (rank, scaling) {sorted(shapes)}.")
    rank, scaling = shapes.pop()
    sources = tuple(load_file(place / "adapter_model.safetensors") for place in places)
    return Experts(count, rank, scaling, sources[:count], noise)


def write_folders(base: nn.Module, experts: Experts, root: Path, count: int) -> list[str]:
    """The first `count` experts as PEFT writes adapters, for the sides that read folders."""
    modules = linear_modules(base)
    config = {
        "peft_type": "LORA",
        "task_type": task_type(base),
        "r": experts.rank,
        "lora_alpha": experts.scaling * experts.rank,
        "target_modules": target_modules(base),
    }
    tensors: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
    for name, linear in modules.items():
        lora_A, lora_B = experts.factors(name, linear)
        for expert, found in enumerate(tensors):
            found[f"{PREFIX}{name}.lora_A.weight"] = lora_A[expert].clone()
            found[f"{PREFIX}{name}.lora_B.weight"] = lora_B[expert].clone()
    folders = []
    for expert, found in enumerate(tensors):
        folder = root / f"expert-{expert}"
        folder.mkdir(parents=True)
        save_file(found, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config))
        folders.append(str(folder))
    return folders


def target_modules(base: nn.Module) -> list[str]:
    """The last names of the linear modules."""
    return sorted({name.rpartition(".")[2] for name in linear_modules(base)})


def task_type(base: nn.Module) -> str | None:
    """Of adapters of this base."""
    return "CAUSAL_LM" if hasattr(base, "get_output_embeddings") else None


def expert_bytes(base: nn.Module, rank: int) -> int:
    """Bytes of one expert's factors in the dtype of the base: the sum over modules of rank x (I + O) numbers."""
    return sum(rank * sum(linear.weight.shape) * linear.weight.itemsize for linear in linear_modules(base).values())
