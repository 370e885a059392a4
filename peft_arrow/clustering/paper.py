"""Model-Based Clustering as the paper's authors run it: sparsify, truncated SVD, cosine matrix, k-means on its rows.

Ostapenko et al. 2024, https://arxiv.org/abs/2405.11157, Algorithm 1. The paper does not give the sparsifying, the
sizes and the seeds; they are those of the authors' code, microsoft/mttl (`library_transforms.py`,
`mbc_clustering.py`).

The matrix of all parameters is never made. With X its sparsified (N, P) form, all that follows depends on X X^T alone,
and X X^T is added up from one tensor of all adapters at a time: the truncated SVD of the (N, N) square root of X X^T
has the random numbers, the power iterations and the result of the one of X.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.metrics.pairwise import cosine_similarity
from tqdm import tqdm

from ..library.adapter import Adapter
from ..library.delta import MANY
from ..library.lora import KEY_PREFIX, outline_lora
from .selection import ModuleChoice


COMPONENTS = 64


def paper_similarity(
    adapters: Mapping[str, Adapter], sparsity: float, seed: int | None, choice: ModuleChoice
) -> np.ndarray:
    """Steps 1 to 4 and the cosine matrix for adapters of equal shapes, (N, N) float32.

    Args:
        adapters (`Mapping[str, Adapter]`): in the order of the rows; the authors sort the names.
        sparsity (`float`): the share of smallest numbers that become zero.
        seed: of the truncated SVD.
        choice (`ModuleChoice`): which modules count; weights are not used.

    Raises:
        ValueError: shapes differ between adapters.
    """
    keys = _common_keys(adapters, choice)
    thresholds = [_threshold(_flat(adapter, keys), sparsity) for adapter in adapters.values()]
    shown = tqdm(keys, "Comparing numbers", unit="tensor", leave=False, disable=len(adapters) < MANY)
    parts = (np.stack([_flat(adapter, [key]) for adapter in adapters.values()]) for key in shown)
    return embedded_similarity(_gram(parts, thresholds), seed)


def paper_row_similarity(rows: np.ndarray, sparsity: float, seed: int | None) -> np.ndarray:
    """The same for rows that are already flat."""
    thresholds = [_threshold(row, sparsity) for row in rows]
    return embedded_similarity(_gram([rows], thresholds), seed)


def paper_labels(similarity: np.ndarray, n_clusters: int, seed: int | None) -> np.ndarray:
    """Step 5: k-means on the rows of the similarity matrix."""
    return KMeans(n_clusters, init="k-means++", n_init=10, random_state=seed).fit_predict(similarity)


def embedded_similarity(gram: np.ndarray, seed: int | None) -> np.ndarray:
    """Cosines of the rows of the truncated SVD of X, from X X^T; (N, N) float32.

    With R the symmetric root of X X^T = R R, X = R W for some W of orthonormal rows, and the SVD works on X^T = W^T R
    because X is wide. What it draws has N rows, and what it computes from W^T R is W^T times what it computes from R.
    """
    if len(gram) == 1:
        return np.ones((1, 1), dtype=np.float32)
    values, vectors = np.linalg.eigh(gram)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    svd = TruncatedSVD(min(COMPONENTS, len(root)), algorithm="randomized", n_iter=5, random_state=seed)
    svd.fit(root)
    embedded = (svd.components_.T * svd.singular_values_).astype(np.float32)
    return cosine_similarity(embedded / np.maximum(np.linalg.norm(embedded, axis=1, keepdims=True), 1e-30))


def _gram(parts: Iterable[np.ndarray], thresholds: Sequence[float]) -> np.ndarray:
    """X X^T in float64, with the numbers of each row up to its threshold set to zero."""
    limits = np.array(thresholds)[:, None]
    gram = np.zeros((len(thresholds), len(thresholds)))
    for part in parts:
        sparse = np.where(abs(part) > limits, part, 0).astype(np.float64)
        gram += sparse @ sparse.T
    return gram


def _threshold(flat: np.ndarray, sparsity: float) -> float:
    return float(np.quantile(abs(flat), sparsity))


def _flat(adapter: Adapter, keys: Sequence[str]) -> np.ndarray:
    """lora_A and lora_B as they are, without alpha / r, one behind another in the order of the keys; float32."""
    tensors = adapter.tensors if len(keys) == 1 else dict(adapter.tensors.items())
    return torch.cat([tensors[key].detach().cpu().float().flatten() for key in keys]).numpy()


def _common_keys(adapters: Mapping[str, Adapter], choice: ModuleChoice) -> list[str]:
    """The keys of all factors that count, in order.

    Raises:
        ValueError: an adapter has other keys or shapes than the first.
    """
    first_name, first = None, {}
    for name, adapter in adapters.items():
        shapes = dict(_shapes(adapter, choice))
        first_name, first = first_name or name, first or shapes
        if shapes != first:
            differing = min(key for key in {*shapes, *first} if shapes.get(key) != first.get(key))
            raise ValueError(
                f"embedding='paper' compares the numbers of lora_A and lora_B, so all adapters need the same modules "
                f"and ranks: {differing} is {first.get(differing)} in {first_name!r} and {shapes.get(differing)} in "
                f"{name!r}; embedding='delta' compares any adapters."
            )
    return sorted(first)


def _shapes(adapter: Adapter, choice: ModuleChoice) -> Iterator[tuple[str, tuple[int, ...]]]:
    plain = {key.removeprefix(KEY_PREFIX): key for key in adapter.tensors}
    for module, factor in outline_lora(adapter).factors.items():
        if choice(module):
            for half, tensor in (("A", factor.lora_A), ("B", factor.lora_B)):
                yield plain[f"{module}.lora_{half}.weight"], tuple(tensor.shape)
