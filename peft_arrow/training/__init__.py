"""From data to adapters, on TRL's SFTTrainer and accelerate."""

from importlib.util import find_spec


for _package in ("trl", "datasets", "accelerate"):
    if find_spec(_package) is None:
        raise ImportError(f'training needs {_package}: pip install "peft-arrow[train]"')

from .adapter import train_adapter  # noqa: E402
from .errors import NotFinite, TrainingFailed  # noqa: E402
from .groups import train_groups  # noqa: E402


__all__ = ["NotFinite", "TrainingFailed", "train_adapter", "train_groups"]
