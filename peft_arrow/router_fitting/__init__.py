"""What some routers learn from data, and calibration: numbers out, the model as it was."""

from __future__ import annotations

from .calibration import calibrate
from .fit import fit
from .fitted import Fitted
from .heads import PromptHead


__all__ = ["Fitted", "PromptHead", "calibrate", "fit"]
