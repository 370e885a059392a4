"""From data sets to a saved library: where training and clustering meet."""

from .kinds import KINDS
from .libraries import train_library
from .tasks import read_tasks


__all__ = ["KINDS", "read_tasks", "train_library"]
