"""From how alike N things are to groups of them, and to how many groups there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score


Labeller = Callable[[int], np.ndarray]


def cosine_distance(similarity: np.ndarray) -> np.ndarray:
    """1 - cosine, with a diagonal of zeros."""
    distance = np.maximum(1 - similarity.astype(np.float64), 0)
    np.fill_diagonal(distance, 0)
    return distance


def average_tree(similarity: np.ndarray) -> np.ndarray:
    """The tree of average linkage (UPGMA) on the cosine distance, as scipy writes it: (N - 1, 4)."""
    return linkage(squareform(cosine_distance(similarity), checks=False), "average")


def average_groups(similarity: np.ndarray) -> Labeller:
    """Number of groups -> labels, all cut from one tree; nothing random. See docs/clustering.md for the choice."""
    if len(similarity) == 1:
        return lambda count: np.zeros(1, dtype=int)
    tree = average_tree(similarity)
    return lambda count: by_first_member(cut_tree(tree, n_clusters=count)[:, 0])


def spectral_groups(similarity: np.ndarray, seed: int | None) -> Labeller:
    """Number of groups -> labels by spectral clustering, Ng, Jordan and Weiss 2001.

    https://papers.nips.cc/paper/2092-on-spectral-clustering-analysis-and-an-algorithm: eigenvectors of
    D^-1/2 S D^-1/2, rows at length 1, k-means. Each adapter is divided by how alike it is to all, so a rank or a
    training that makes an adapter less like any other does not matter. S is without diagonal and negative entries.
    """
    affinity = np.maximum(similarity.astype(np.float64), 0)
    np.fill_diagonal(affinity, 0)
    degrees = affinity.sum(axis=1)
    degrees = np.maximum(degrees, max(0.01 * degrees.mean(), 1e-12))
    vectors = np.linalg.eigh(affinity / np.sqrt(np.outer(degrees, degrees)))[1]

    def labels(count: int) -> np.ndarray:
        rows = vectors[:, -count:]
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        return by_first_member(KMeans(count, n_init=10, random_state=seed).fit_predict(rows))

    return labels


def by_first_member(labels: np.ndarray) -> np.ndarray:
    """The same groups, numbered in the order of their first members."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=int)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def silhouette(similarity: np.ndarray, labels: np.ndarray) -> float:
    """Mean silhouette on the cosine distance, Rousseeuw 1987; NaN where it has no value: 1 group, or N of them."""
    if not 2 <= len(np.unique(labels)) < len(labels):
        return float("nan")
    return float(silhouette_score(cosine_distance(similarity), labels, metric="precomputed"))


def best_count(labeller: Labeller, similarity: np.ndarray, counts: Iterable[int]) -> int:
    """The number of groups with the largest silhouette; of equal ones the smallest."""
    return max(counts, key=lambda count: (silhouette(similarity, labeller(count)), -count))
