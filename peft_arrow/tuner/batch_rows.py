"""Which rows of the batch a layer is working on, where `adapter_names` sends rows to different adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar


_ROWS: ContextVar[tuple[list[int], int] | None] = ContextVar("rows", default=None)


@contextlib.contextmanager
def batch_rows(rows: Sequence[int], size: int) -> Iterator[None]:
    """While open, in this thread: the inputs are `rows` of a batch of `size`."""
    token = _ROWS.set((list(rows), size))
    try:
        yield
    finally:
        _ROWS.reset(token)


def current_rows() -> tuple[list[int], int] | None:
    """The rows and the size of their batch; None where the whole batch is worked on."""
    return _ROWS.get()
