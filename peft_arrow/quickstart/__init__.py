"""What `make quickstart` runs: small tasks made by code, adapters for them, and what routing is worth."""

from .methods import JudgeSettings
from .run import run_quickstart
from .train import TrainSettings


__all__ = ["JudgeSettings", "TrainSettings", "run_quickstart"]
