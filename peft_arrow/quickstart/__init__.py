"""What `make quickstart` runs: small tasks made by code, a library built from them, and what routing it is worth."""

from .methods import JudgeSettings
from .run import run_quickstart
from .settings import TrainSettings
from .train import BuildFailed


__all__ = ["BuildFailed", "JudgeSettings", "TrainSettings", "run_quickstart"]
