"""From data sets to a saved library: where training and clustering meet."""

from .build import Options
from .kinds import KINDS
from .libraries import train_library
from .tasks import read_tasks


__all__ = ["KINDS", "Options", "read_tasks", "train_library"]
