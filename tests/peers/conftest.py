"""Three adapters of the tiny Llama, made once."""

from __future__ import annotations

import pytest

from .adapters import adapter


@pytest.fixture(scope="session")
def trio(tmp_path_factory) -> dict[str, str]:
    """Equal ranks and modules, as PEFT's own Arrow needs them: name -> folder. Not to be written to."""
    root = tmp_path_factory.mktemp("trio")
    return {name: adapter(root / name, seed=seed, r=4) for seed, name in enumerate(("one", "two", "three"), 1)}


@pytest.fixture(scope="session")
def mixed(tmp_path_factory) -> dict[str, str]:
    """Different ranks, modules and scalings: name -> folder. Not to be written to."""
    root = tmp_path_factory.mktemp("mixed")
    return {
        "attention": adapter(root / "attention", seed=11, r=4),
        "mlp": adapter(root / "mlp", seed=12, r=8, target_modules=["up_proj", "down_proj"], use_rslora=True),
        "all": adapter(root / "all", seed=13, r=2, lora_alpha=4, target_modules="all-linear"),
    }
