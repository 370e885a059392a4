"""Route every token, in every layer, to the right LoRA adapters of a library.

Importing this package registers the PEFT type `ARROW_LORA`; the names below are resolved when they are first used.
"""

from importlib import import_module

from .modeling import bind_to_peft_model
from .tuner import ArrowLoraConfig, ArrowLoraModel
from .version import __version__


_LAZY = {
    "Adapter": "library.adapter",
    "AdapterLibrary": "library.library",
    "AdapterRef": "library.adapter",
    "AdapterReport": "library.report",
    "KERNELS": "ops",
    "MBCClusterer": "clustering.mbc",
    "ROUTERS": "routers",
    "Router": "routers",
    "Routing": "routers",
    "RoutingTrace": "tuner.trace",
    "Task": "evaluation.tasks",
    "TrainingFailed": "training",
    "adapt": "adaptation.adapt",
    "evaluate_library": "evaluation.judge",
    "merge_adapters": "clustering.merging",
    "push_to_hub": "modeling",
    "random_like": "library.transforms",
    "subtract_general": "library.transforms",
    "train_adapter": "training",
    "train_groups": "training",
    "train_library": "building",
    "vet_adapter": "library.vetting",
    "vet_adapters": "library.vetting",
}

bind_to_peft_model()

__all__ = ["ArrowLoraConfig", "ArrowLoraModel", "__version__", *_LAZY]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
