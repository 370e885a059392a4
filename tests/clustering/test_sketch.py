"""The sketch: unbiased, within its bound, the same everywhere, one adapter in memory at a time."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from peft_arrow import AdapterLibrary, MBCClusterer
from peft_arrow.clustering.sketch import DeltaSketch, sketch_adapters, sketch_error
from peft_arrow.library.files import WeightsFile
from tests.clustering.planted import dense, make_adapter, planted, random_adapter


def test_it_is_the_sketch_of_the_dense_update():
    """Entry (o, i) with its two signs at place (h(o) + g(i)) mod D, by the definition."""
    adapter, sketch = random_adapter("a", 1, 3), DeltaSketch(50, 7)
    found, length = sketch(adapter)
    expected = np.zeros(50)
    for module, update in dense(adapter).items():
        shape = (module, update.shape[1], update.shape[0])
        (g, in_signs), (h, out_signs) = (sketch._maps[(*shape, side)] for side in ("in", "out"))
        places = (h.numpy()[:, None] + g.numpy()) % 50
        np.add.at(expected, places, update * np.outer(out_signs, in_signs))
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert length == pytest.approx(np.sqrt(sum((update**2).sum() for update in dense(adapter).values())))


def errors(adapters, dim: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors of all cosines over the seeds, (seeds, pairs), and the true cosines."""
    upper = np.triu_indices(len(adapters), 1)
    vectors = np.stack([np.concatenate([part.ravel() for part in dense(one).values()]) for one in adapters])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    truth = (vectors @ vectors.T)[upper]
    rows = [sketch_adapters(adapters, DeltaSketch(dim, seed)) for seed in range(seeds)]
    return np.stack([(row @ row.T)[upper] - truth for row in rows]), truth


@pytest.mark.parametrize("dim", [64, 256])
def test_error_against_the_bound(dim):
    """Unbiased; the standard error is that of full hashing for many modules, and below the bound for rank 1."""
    many = list(planted(0, 2, 3)[0].values())
    found, truth = errors(many, dim, 60)
    expected = np.array([sketch_error(dim, cosine) for cosine in truth])
    assert abs(found.mean(axis=0)).max() < 5 * expected.max() / 60**0.5
    assert np.sqrt((found**2).mean()) == pytest.approx(np.sqrt((expected**2).mean()), rel=0.25)
    single = np.random.default_rng(0)
    near = single.standard_normal((1, 32))
    worst = [
        make_adapter(
            name, {"model.layers.0.self_attn.q_proj": (near + 0.3 * single.standard_normal((1, 32)), near.T)}, 1
        )
        for name in ("x", "y")
    ]
    found, _ = errors(worst, dim, 200)
    print(f"dim {dim}: rank 1 {np.sqrt((found**2).mean()):.4f}, bound {sketch_error(dim, worst=True):.4f}")
    assert np.sqrt((found**2).mean()) < sketch_error(dim, worst=True)


def test_seeded():
    """Equal seeds give equal numbers, now and on other machines; other seeds do not."""
    adapter = random_adapter("a", 1)
    first, second = (DeltaSketch(64, 1)(adapter)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert abs(first - DeltaSketch(64, 2)(adapter)[0]).max() > 1
    places, signs = DeltaSketch(1000, 42)._draw(("layer", 4, 4, "in"), 4)
    assert places.tolist() == PLACES and signs.tolist() == SIGNS


PLACES, SIGNS = [768, 12, 894, 817], [-1.0, -1.0, 1.0, 1.0]


def test_pairs_by_sketch_find_the_families():
    library, _ = planted(0)
    exact, sketched = MBCClusterer(5).fit(library), MBCClusterer(5, pairs="sketch").fit(library)
    assert exact.clusters_ == sketched.clusters_
    limit = 6 * sketch_error(16384, 1.0)
    assert 0 < abs(exact.similarity_ - sketched.similarity_).max() < limit


@pytest.mark.parametrize("pairs", ["exact", "sketch"])
def test_adapters_stream_from_disk(tmp_path, monkeypatch, pairs):
    """Of 12 adapters on disk the tensors of at most two are alive, however they are compared."""
    planted(0, 3, 4, one_rank=True)[0].save_pretrained(tmp_path / "library")
    alive, most = weakref.WeakSet(), [0]

    def watch(tensor):
        alive.add(tensor)
        most[0] = max(most[0], sum(one.nelement() for one in alive))
        return tensor

    read_all, read_one = WeightsFile.items, WeightsFile.__getitem__
    monkeypatch.setattr(WeightsFile, "items", lambda self: {k: watch(v) for k, v in read_all(self)}.items())
    monkeypatch.setattr(WeightsFile, "__getitem__", lambda self, key: watch(read_one(self, key)))
    monkeypatch.setattr("peft_arrow.library.delta.KEPT_BYTES", 0)
    gc.collect()
    library = AdapterLibrary.from_pretrained(tmp_path / "library")
    one = sum(tensor.nelement() for tensor in library["f0v0"].tensors.values())
    most[0] = 0
    MBCClusterer(3, pairs=pairs).fit(library)
    assert 0 < most[0] <= 2 * one


def test_paper_streams_too(tmp_path, monkeypatch):
    """The recipe's matrix of all adapters and parameters is never made: one tensor of each adapter at a time."""
    library, _ = planted(0, 3, 4, one_rank=True, shared_start=True)
    largest, stack = [0], np.stack

    def watched(parts, *args, **kwargs):
        found = stack(parts, *args, **kwargs)
        largest[0] = max(largest[0], found.size)
        return found

    monkeypatch.setattr("peft_arrow.clustering.paper.np.stack", watched)
    MBCClusterer(3, embedding="paper", sketch_dim=64).fit(library)
    assert largest[0] <= 12 * max(tensor.nelement() for tensor in library["f0v0"].tensors.values())


def test_dtype_of_the_factors_does_not_matter_to_the_length():
    adapter = random_adapter("a", 1)
    double = type(adapter)("b", adapter.config, {key: tensor.double() for key, tensor in adapter.tensors.items()})
    assert DeltaSketch(64, 1)(adapter)[1] == pytest.approx(DeltaSketch(64, 1)(double)[1])
    assert double.tensors[next(iter(double.tensors))].dtype == torch.float64
