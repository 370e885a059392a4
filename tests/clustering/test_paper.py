"""The paper's recipe against a transcription of its steps in plain numpy and scikit-learn, label for label."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.metrics.pairwise import cosine_similarity

from peft_arrow import AdapterLibrary, MBCClusterer
from tests.clustering.planted import planted, random_adapter


def transcription(library, n_clusters: int, sparsity: float) -> tuple[np.ndarray, np.ndarray]:
    """Flatten everything, sparsify, truncated SVD, length 1, cosine matrix, k-means on its rows."""
    flat = []
    for name in sorted(library):
        tensors = library[name].tensors
        vector = np.concatenate([tensors[key].float().numpy().ravel() for key in sorted(tensors)])
        vector[abs(vector) <= np.quantile(abs(vector), sparsity)] = 0
        flat.append(vector)
    svd = TruncatedSVD(
        n_components=64,
        algorithm="randomized",
        n_iter=5,
        n_oversamples=10,
        power_iteration_normalizer="auto",
        random_state=42,
    )
    embedded = svd.fit_transform(np.stack(flat))
    embedded /= np.linalg.norm(embedded, axis=1, keepdims=True)
    similarity = cosine_similarity(embedded, embedded)
    return KMeans(n_clusters, init="k-means++", n_init=10, random_state=42).fit(similarity).labels_, similarity


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
@pytest.mark.parametrize(("families", "versions"), [(4, 4), (10, 9)])
@pytest.mark.parametrize("noise", [0.5, 3.0])
def test_label_for_label(families, versions, sparsity, noise):
    """Few adapters, and more than 64 components, where the truncated SVD is approximate and random numbers count."""
    library, _ = planted(0, families, versions, shared_start=True, one_rank=True, noise=noise)
    labels, similarity = transcription(library, 10, sparsity)
    found = MBCClusterer(10, embedding="paper", sparsity_threshold=sparsity).fit(library.select(sorted(library)))
    np.testing.assert_allclose(found.similarity_, similarity, atol=2e-4)
    np.testing.assert_array_equal(found.labels_, labels)
    assert found.clusters_["cluster_0"] == [name for name, label in zip(sorted(library), labels) if label == 0]


def test_bf16_is_read_as_float32():
    library, _ = planted(1, 3, 3, shared_start=True, one_rank=True)
    half = AdapterLibrary(
        {
            name: replace(one, tensors={key: tensor.bfloat16() for key, tensor in one.tensors.items()})
            for name, one in library.items()
        }
    )
    labels, _ = transcription(half, 3, 0.5)
    found = MBCClusterer(3, embedding="paper").fit(half.select(sorted(half)))
    np.testing.assert_array_equal(found.labels_, labels)


def test_alpha_does_not_enter_and_other_shapes_are_refused():
    library, _ = planted(2, 3, 3, shared_start=True, one_rank=True)
    louder = {name: replace(one, config={**one.config, "lora_alpha": 1.0}) for name, one in library.items()}
    first, second = (MBCClusterer(3, embedding="paper").fit(one) for one in (library, louder))
    np.testing.assert_array_equal(first.similarity_, second.similarity_)
    mixed = {"a": random_adapter("a", 1, 4), "b": random_adapter("b", 2, 8)}
    with pytest.raises(ValueError, match=r"\(4, 32\) in 'a' and \(8, 32\) in 'b'; embedding='delta' compares"):
        MBCClusterer(2, embedding="paper").fit(mixed)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters:sklearn.exceptions.ConvergenceWarning")
def test_fewer_different_adapters_than_clusters():
    """k-means leaves clusters empty then; none of ours is."""
    library, _ = planted(2, 2, 1, shared_start=True, one_rank=True)
    first, second = library.values()
    named = {f"{one.name}-{copy}": one for one in (first, second) for copy in "ab"}
    copies = {name: replace(one, name=name) for name, one in named.items()}
    found = MBCClusterer(3, embedding="paper").fit(AdapterLibrary(copies))
    assert found.n_clusters_ == len(found.clusters_) == 2
    assert all(found.clusters_.values())
    assert sorted(set(found.labels_)) == [0, 1]
    assert np.isfinite(found.centroids_).all()
    assert len(found.merge_experts()) == 2
