"""What an estimator is given: adapters, in any of the ways they are referred to, or an array of features."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from scipy.sparse import issparse

from ..library.adapter import Adapter, AdapterRef
from ..library.library import AdapterLibrary


REFERENCES = (str, PathLike, AdapterRef, Adapter)


def is_adapters(source: Any) -> bool:
    """Whether it names adapters: a library, a reference to one, a dict, or a list or tuple of references."""
    if isinstance(source, (Mapping, *REFERENCES)):
        return not issparse(source)  # one kind of sparse matrix is a mapping
    return isinstance(source, (list, tuple)) and len(source) > 0 and isinstance(source[0], REFERENCES)


def as_library(source: Any, **options: Any) -> AdapterLibrary:
    """The adapters as a library; references are looked up by `AdapterLibrary.from_pretrained` with these options.

    Raises:
        ValueError: nothing readable is there, or the adapters do not go together.
    """
    if isinstance(source, AdapterLibrary):
        return source
    if isinstance(source, Adapter):
        source = [source]
    return AdapterLibrary.from_pretrained(source, **options)
