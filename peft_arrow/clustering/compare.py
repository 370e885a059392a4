"""How alike the things to cluster are, by the way that was asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from ..library.adapter import Adapter
from ..library.delta import MANY
from ..library.library import AdapterLibrary
from .paper import paper_row_similarity, paper_similarity
from .selection import ModuleChoice
from .similarity import delta_similarity, row_similarity, unit_rows
from .sketch import DeltaSketch, sketch_adapters


# `pairs="auto"`: up to here all pairs are compared exactly, beyond by sketches; docs/clustering.md has times.
MOST_EXACT = 1000


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compared:
    """What was compared, in the order of the computation.

    Args:
        names (`tuple[str, ...]`): of the N things.
        similarity (`np.ndarray`): (N, N) cosines.
        features (`np.ndarray`, *optional*): (N, F), of length 1, where they were made on the way.
    """

    names: tuple[str, ...]
    similarity: np.ndarray
    features: np.ndarray | None


def compare_adapters(
    library: AdapterLibrary, *, embedding: str, pairs: str, sparsity: float, choice: ModuleChoice, sketch: DeltaSketch
) -> Compared:
    """Compare all pairs of a library's adapters; the arguments are those of `MBCClusterer`."""
    names = tuple(library)
    if embedding == "paper":
        return Compared(names, paper_similarity(library, sparsity, sketch.seed, choice), None)
    if pairs == "auto":
        pairs = "exact" if len(library) <= MOST_EXACT else "sketch"
        logger.info("pairs='auto' chose %r for %d adapters.", pairs, len(library))
    if pairs == "exact":
        return Compared(names, delta_similarity(library, choice), None)
    features = sketch_adapters(shown(library), sketch)
    return Compared(names, row_similarity(features), features)


def shown(library: AdapterLibrary) -> Iterable[Adapter]:
    """The adapters, under a bar where they are many."""
    return tqdm(library.values(), desc="Sketching", unit="adapter", leave=False, disable=len(library) < MANY)


def compare_rows(rows: np.ndarray, *, embedding: str, sparsity: float, seed: int) -> Compared:
    """Compare all pairs of rows."""
    features, names = unit_rows(rows), tuple(str(row) for row in range(len(rows)))
    if embedding == "paper":
        return Compared(names, paper_row_similarity(rows, sparsity, seed), features)
    return Compared(names, row_similarity(features), features)


def centroids(
    compared: Compared, labels: np.ndarray, library: AdapterLibrary | None, sketch: DeltaSketch
) -> np.ndarray:
    """The mean of each cluster's members, by their features at length 1: (clusters, F) float32.

    Features that are not there are sketched now, one adapter in memory at a time.
    """
    counts = np.bincount(labels)
    if compared.features is not None:
        sums = np.stack([compared.features[labels == label].sum(axis=0) for label in range(len(counts))])
    else:
        sums = np.zeros((len(counts), sketch.dim))
        for adapter, label in zip(shown(library), labels, strict=True):
            sums[label] += sketch_adapters([adapter], sketch)[0]
    return (sums / counts[:, None]).astype(np.float32)
