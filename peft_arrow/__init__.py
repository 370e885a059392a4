"""Route every token, in every layer, to the right LoRA adapters of a library.

Importing this package registers the PEFT type `ARROW_LORA`; the names below are resolved when they are first used.
"""

from importlib import import_module

from .tuner import ArrowLoraConfig, ArrowLoraModel
from .version import __version__


_LAZY = {
    "Adapter": "library.adapter",
    "AdapterRef": "library.adapter",
    "KERNELS": "ops",
    "ROUTERS": "routers",
    "Router": "routers",
    "Routing": "routers",
    "RoutingTrace": "tuner.trace",
}

__all__ = ["ArrowLoraConfig", "ArrowLoraModel", "__version__", *_LAZY]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
