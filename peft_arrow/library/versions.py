"""The versions that a card states, as the installed packages give them."""

from __future__ import annotations

from importlib.metadata import version

from ..version import __version__


PACKAGES = {"PEFT": "peft", "Transformers": "transformers", "PyTorch": "torch", "Safetensors": "safetensors"}


def framework_versions() -> dict[str, str]:
    """Name -> version of peft-arrow and of the packages that wrote the files."""
    return {"peft-arrow": __version__, **{name: version(package) for name, package in PACKAGES.items()}}
