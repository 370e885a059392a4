"""Adapters of known families, made as training makes them: a few steps from a random A, or to the end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from peft_arrow import Adapter, AdapterLibrary
from tests.pico import pico_base


BASE = "me/pico"
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


def pico_shapes() -> dict[str, tuple[int, int]]:
    """(out, in) of the attention's modules of the pico base."""
    return {
        name: tuple(module.weight.shape)
        for name, module in pico_base().named_modules()
        if name.rpartition(".")[2] in MODULES
    }


def make_adapter(name: str, factors: dict[str, tuple], alpha: float, **config) -> Adapter:
    """An adapter in memory of module -> (A, B); its rank is theirs."""
    rank = next(iter(factors.values()))[0].shape[0]
    tensors = {}
    for module, (lora_A, lora_B) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.as_tensor(lora_A, dtype=torch.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.as_tensor(lora_B, dtype=torch.float32)
    known = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "base_model_name_or_path": BASE}
    return Adapter(name, {**known, "target_modules": list(MODULES), **config}, tensors)


def random_adapter(name: str, seed: int, rank: int = 4, modules: Sequence[str] | None = None, **config) -> Adapter:
    """An adapter of normal numbers."""
    rng = np.random.default_rng(seed)
    shapes = {module: shape for module, shape in pico_shapes().items() if modules is None or module in modules}
    factors = {
        module: (rng.standard_normal((rank, width)), rng.standard_normal((height, rank)))
        for module, (height, width) in shapes.items()
    }
    return make_adapter(name, factors, 2 * rank, **config)


def planted(
    seed: int,
    families: int = 5,
    versions: int = 5,
    *,
    shared_start: bool = False,
    one_rank: bool = False,
    noise: float = 0.5,
) -> tuple[AdapterLibrary, np.ndarray]:
    """A library of families, in mixed order, and the family of each adapter.

    A family has a wanted update T of rank 4 a module. An adapter sees T with noise and is what a long step of gradient
    descent from a random A and B = 0 makes of it, B = T A^T and A drawn towards T; ranks, alphas and starts differ.
    """
    rng = np.random.default_rng(seed)
    shapes = pico_shapes()
    start = {module: rng.standard_normal((8, width)) / width**0.5 for module, (_, width) in shapes.items()}
    adapters, truth = {}, {}
    for family in range(families):
        wanted = {
            module: rng.standard_normal((height, 4)) @ rng.standard_normal((4, width))
            for module, (height, width) in shapes.items()
        }
        for version in range(versions):
            rank = 8 if one_rank else int(rng.choice([2, 4, 8]))
            factors = {}
            for module, (height, width) in shapes.items():
                target = wanted[module] + noise * 2 * rng.standard_normal((height, width))
                lora_A = start[module][:rank] if shared_start else rng.standard_normal((rank, width)) / width**0.5
                lora_B = target @ lora_A.T
                pull = lora_B.T @ target
                factors[module] = (lora_A + 0.3 * pull * np.linalg.norm(lora_A) / np.linalg.norm(pull), lora_B)
            name = f"f{family}v{version}"
            adapters[name] = make_adapter(name, factors, float(rng.choice([4, 16, 64])))
            truth[name] = family
    order = [list(adapters)[place] for place in rng.permutation(len(adapters))]
    return AdapterLibrary({name: adapters[name] for name in order}), np.array([truth[name] for name in order])


def dense(adapter: Adapter) -> dict[str, np.ndarray]:
    """delta-W of each module, by the definition, float64."""
    scaling = adapter.config["lora_alpha"] / adapter.config["r"]
    found = {}
    for key, tensor in adapter.tensors.items():
        if key.endswith("lora_A.weight"):
            lora_B = adapter.tensors[key.replace("lora_A", "lora_B")]
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[module] = scaling * (lora_B.double() @ tensor.double()).numpy()
    return found
