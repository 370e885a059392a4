"""From data to adapters, on TRL's SFTTrainer and accelerate."""

from .errors import NotFinite, TrainingFailed
from .expert import train_adapter
from .groups import train_groups


__all__ = ["NotFinite", "TrainingFailed", "train_adapter", "train_groups"]
