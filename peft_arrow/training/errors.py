"""What training raises where some tasks failed and the others are done."""

from __future__ import annotations

from collections.abc import Mapping

from ..library.library import AdapterLibrary


class NotFinite(ArithmeticError):
    """The loss or the gradient became NaN or infinite."""


class TrainingFailed(RuntimeError):
    """Some experts could not be trained; the others are finished and stay.

    Args:
        failures (`Mapping[str, str]`): expert name -> what went wrong, in one sentence.
        library (`AdapterLibrary`, *optional*): the finished experts; None where there are none.
        where (`str`): the folder in which the finished experts lie.
    """

    def __init__(self, failures: Mapping[str, str], library: AdapterLibrary | None, where: str) -> None:
        self.failures = dict(failures)
        self.library = library
        finished = f"{len(library)} are in {where}" if library is not None else "no library could be made"
        told = "; ".join(f"{name}: {reason}" for name, reason in self.failures.items())
        super().__init__(
            f"{len(self.failures)} experts failed and {finished}; run the same again to train what is missing. {told}"
        )


# What a task may fail with while the next one is still worth trying; anything else is a fault of the program.
TASK_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
