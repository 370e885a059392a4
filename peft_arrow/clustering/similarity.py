"""Cosines of adapters' updates: (N, N), exact from the factors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ..library.adapter import Adapter
from ..library.delta import delta_products, weight_bytes
from .selection import ModuleChoice
from .sketch import check_length


# Up to this size of all adapters together float64 costs seconds; beyond, float32 takes half the time.
DOUBLE_BYTES = 2**28


def delta_similarity(adapters: Mapping[str, Adapter], choice: ModuleChoice) -> np.ndarray:
    """cos(dW_i, dW_j) = <dW_i, dW_j> / (|dW_i| |dW_j|) over the modules that count, (N, N) float64.

    <dW_i, dW_j> = sum over modules of w s_i s_j tr((B_i^T B_j)(A_j A_i^T)): r x r products, for any ranks. They are
    made in float64 where the adapters take at most 256 MiB together, else in float32, which is good to about 1e-6.

    Raises:
        ValueError: an adapter is no plain LoRA, or its update is zero or not finite.
    """
    size = sum(weight_bytes(adapter) for adapter in adapters.values())
    dtype = torch.float64 if size <= DOUBLE_BYTES else torch.float32
    products = delta_products(adapters.values(), dtype=dtype, module_weight=choice)
    lengths = np.sqrt(np.maximum(np.diag(products), 0))  # maximum keeps NaN
    for name, length in zip(adapters, lengths, strict=True):
        check_length(name, float(length))
    return as_cosines(products / np.outer(lengths, lengths))


def row_similarity(rows: np.ndarray) -> np.ndarray:
    """Inner products of rows that `unit_rows` made, as cosines."""
    return as_cosines(rows @ rows.T)


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows at length 1; a row of zeros stays, and is like no other."""
    rows = rows / np.maximum(abs(rows).max(axis=1, keepdims=True), np.finfo(rows.dtype).tiny)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(rows.dtype).tiny)


def as_cosines(products: np.ndarray) -> np.ndarray:
    """Cosines without what rounding or sketching adds: between -1 and 1, exactly symmetric, 1 on the diagonal."""
    cosines = np.clip((products + products.T) / 2, -1, 1)
    np.fill_diagonal(cosines, 1)
    return cosines
