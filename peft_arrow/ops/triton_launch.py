"""Whether the Triton kernels can run, and the sizes they are launched with.

No size or threshold here was measured: the project has had no GPU so far. All follow from shapes alone, so that no
launch waits for the device and every launch can be captured in a CUDA graph.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from .stack import ExpertBank


# A shrink of few assignments: ranks and features a program takes at a time, and programs it is divided into at most.
FEW_RANKS, FEW_FEATURES, FEW_PROGRAMS = 16, 256, 512
# An expand of few assignments: ranks of chosen experts, and features, a program takes at a time.
FEW_CHOSEN_RANKS, FEW_OUTPUTS = 64, 64
# Sorted assignments: from this mean number an expert, a program takes so many.
CHUNK_ROWS = ((128, 64), (32, 32), (0, 16))
# Matmuls: ranks are padded to what `tl.dot` takes, are taken at most so many at a time, in tiles of so many bytes.
SMALLEST_DOT, LARGEST_RANKS, TILE_BYTES = 16, 64, 8192


find_package = cache(find_spec)


# Not cached themselves: torch.compile would trace through the cache, with a warning, and not take the result as it is.
@torch.compiler.assume_constant_result
def has_triton() -> bool:
    """Whether triton is installed."""
    return find_package("triton") is not None


@torch.compiler.assume_constant_result
def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_triton(device: torch.device) -> None:
    """Raise an `ImportError` where triton is missing, a `ValueError` where it cannot run on this device."""
    if not has_triton():
        raise ImportError(
            "kernel='triton' needs the package triton, which is not installed; PyTorch's CUDA build brings it. "
            "Install that, or choose kernel='auto'."
        )
    if device.type != "cuda" and not is_interpreted():
        raise ValueError(
            f"kernel='triton' got inputs on {device.type!r}; it needs a CUDA device: choose kernel='auto'."
        )


@cache
def kernels(name: str) -> ModuleType:
    """A file of kernels. It imports triton, so it is loaded when one of them first runs."""
    return import_module(f".{name}", __package__)


def launch(kernel: Any, grid: tuple[int, ...], tensor: torch.Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of `tensor`, its first argument."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):
            kernel[grid](tensor, *arguments, **constants)
    else:
        kernel[grid](tensor, *arguments, **constants)


def ranks_differ(bank: ExpertBank) -> bool:
    """Whether the experts of a bank have different ranks; read off shapes, as there may be thousands of experts."""
    return bank.lora_A.weight.shape[0] != len(bank.experts) * bank.constants.columns_MR.shape[1]


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products of this dtype are summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def ceil_div(total: int, size: int) -> int:
    """How many blocks of `size` cover `total`."""
    return -(-total // size)


def rank_block(widest: int) -> int:
    """Ranks of a `tl.dot`: padded to a power of two of at least 16, and taken in turns where they are many."""
    return min(max(power_of_two(widest), SMALLEST_DOT), LARGEST_RANKS)


def feature_block(dtype: torch.dtype, widest: int) -> int:
    """Features of a `tl.dot`: fewer where numbers or ranks are wide, so that tiles stay in registers."""
    return min(256, TILE_BYTES // rank_block(widest)) // dtype.itemsize


def shrink_parts(assignments: int, widest: int, features: int) -> int:
    """Into how many parts a shrink of few assignments divides the features; a power of two."""
    programs, parts = assignments * ceil_div(widest, FEW_RANKS), 1
    while 2 * parts * programs <= FEW_PROGRAMS and 2 * parts * FEW_FEATURES <= features:
        parts *= 2
    return parts


def chunk_rows(assignments: int, members: int) -> int:
    """Sorted assignments of one expert that a program takes together."""
    return next(rows for mean, rows in CHUNK_ROWS if assignments >= mean * members)
