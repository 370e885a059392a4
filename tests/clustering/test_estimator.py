"""MBCClusterer as scikit-learn and as its users see it: checks, planted families, invariance, predict, errors."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score, silhouette_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from peft_arrow import AdapterLibrary, MBCClusterer
from tests.clustering.planted import BASE, dense, make_adapter, pico_shapes, planted, random_adapter
from tests.pico import pico_adapter


# scikit-learn checks array API input only where SciPy was started for it.
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks(
    [MBCClusterer(), MBCClusterer(grouping="spectral"), MBCClusterer(2, embedding="paper"), MBCClusterer("auto")]
)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("shared_start", [True, False])
@pytest.mark.parametrize("grouping", ["average", "spectral"])
def test_planted_families(shared_start, grouping):
    """Mixed ranks, alphas and starts, five seeds: the families come back, and with average linkage their number."""
    for seed in range(5):
        library, truth = planted(seed, shared_start=shared_start)
        found = MBCClusterer(5, grouping=grouping).fit(library)
        assert adjusted_rand_score(truth, found.labels_) >= 0.9
        count = MBCClusterer("auto", grouping=grouping).fit(library).n_clusters_
        assert count == 5 or (grouping == "spectral" and abs(count - 5) == 1)


def test_paper_beside_delta():
    """With equal ranks and one start the paper's recipe finds the families; with other starts delta-W still does."""
    scores = {}
    for shared in (True, False):
        for embedding in ("paper", "delta"):
            found = []
            for seed in range(5):
                library, truth = planted(seed, shared_start=shared, one_rank=True)
                labels = MBCClusterer(5, embedding=embedding).fit_predict(library)
                found.append(adjusted_rand_score(truth, labels))
            scores[embedding, "shared start" if shared else "own starts"] = float(np.mean(found))
    print({" ".join(key): round(score, 2) for key, score in scores.items()})
    assert scores["delta", "shared start"] >= 0.9 and scores["delta", "own starts"] >= 0.9
    assert scores["paper", "shared start"] >= 0.9


def test_attributes():
    library, truth = planted(0)
    found = MBCClusterer(5).fit(library)
    vectors = np.stack([np.concatenate([part.ravel() for part in dense(one).values()]) for one in library.values()])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(found.similarity_, vectors @ vectors.T, atol=1e-6)
    assert found.names_ == list(library) and found.n_clusters_ == 5
    assert list(found.clusters_) == [f"cluster_{number}" for number in range(5)]
    assert {name: int(label) for name, label in zip(found.names_, found.labels_, strict=True)} == {
        name: int(cluster.removeprefix("cluster_")) for cluster, names in found.clusters_.items() for name in names
    }
    distance = 1 - np.minimum(found.similarity_, 1)
    assert found.silhouette_ == pytest.approx(silhouette_score(distance, found.labels_, metric="precomputed"))


@pytest.mark.parametrize("options", [{}, {"pairs": "sketch"}, {"embedding": "paper"}])
def test_the_order_of_the_adapters_decides_nothing(options):
    library, _ = planted(1, one_rank=True)
    first = MBCClusterer(5, **options).fit(library)
    second = MBCClusterer(5, **options).fit(library.select(reversed(list(library))))
    assert first.clusters_ == second.clusters_
    np.testing.assert_array_equal(first.similarity_, second.similarity_[::-1, ::-1])


def rewritten(adapter, seed: int):
    """The same update from other factors: (A, B) -> (M A, B M^-1), then padded with zero ranks to twice the rank."""
    rng = np.random.default_rng(seed)
    rank, factors = adapter.config["r"], {}
    for module in pico_shapes():
        lora_A, lora_B = (
            adapter.tensors[f"base_model.model.{module}.lora_{half}.weight"].double().numpy() for half in "AB"
        )
        mix = rng.standard_normal((rank, rank)) + 2 * np.eye(rank)
        lora_A, lora_B = mix @ lora_A, lora_B @ np.linalg.inv(mix)
        factors[module] = (np.pad(lora_A, ((0, rank), (0, 0))), np.pad(lora_B, ((0, 0), (0, rank))))
    return make_adapter(adapter.name, factors, 2 * adapter.config["lora_alpha"])


def test_invariance():
    """How an update is written as a product changes no similarity beyond 1e-5, and no cluster."""
    library, _ = planted(2)
    other = AdapterLibrary({name: rewritten(one, place) for place, (name, one) in enumerate(library.items())})
    first, second = MBCClusterer(5).fit(library), MBCClusterer(5).fit(other)
    assert abs(first.similarity_ - second.similarity_).max() < 1e-5
    assert first.clusters_ == second.clusters_
    np.testing.assert_array_equal(second.predict(library), first.labels_)


def test_predict_needs_no_old_adapter():
    """New members of the families find them, in another process's copy, which is far smaller than the adapters."""
    everything, truth = planted(3, versions=8)
    old = [name for name in everything if int(name[-1]) < 5]
    found = MBCClusterer(5).fit(everything.select(old))
    stored = pickle.dumps(found)
    assert len(stored) < 8 * 5 * found.sketch_dim
    copy = pickle.loads(stored)
    new = everything.without(old)
    family = {name[:2]: label for name, label in zip(found.names_, found.labels_, strict=True)}
    assert copy.predict(new).tolist() == [family[name[:2]] for name in new]
    np.testing.assert_array_equal(copy.predict(everything.select(old)), found.labels_)
    with pytest.raises(ValueError, match="pass library="):
        copy.merge_experts()
    assert len(copy.merge_experts(library=everything)) == 5


def test_references(tmp_path):
    """Folders, a dict, a saved library: the same as the library in memory."""
    folders = {
        name: pico_adapter(tmp_path / name, seed=seed, r=rank, target_modules=["q_proj", "v_proj"])
        for name, seed, rank in (("one", 1, 2), ("two", 2, 4), ("three", 3, 4))
    }
    estimator = MBCClusterer(2, base_model=BASE)
    labels = estimator.fit(list(folders.values())).labels_
    assert estimator.names_ == ["one", "two", "three"]
    np.testing.assert_array_equal(labels, estimator.fit(folders).labels_)
    library = AdapterLibrary.from_pretrained(folders, BASE)
    library.save_pretrained(tmp_path / "library")
    np.testing.assert_array_equal(labels, MBCClusterer(2).fit(str(tmp_path / "library")).labels_)
    np.testing.assert_array_equal(labels, estimator.fit(library).predict([folders["one"], *folders.values()])[1:])


def test_bf16_and_selection():
    """bf16 factors are read as they are; layers, modules and weights choose what counts."""
    library, _ = planted(4)
    half = {
        name: replace(one, tensors={key: tensor.bfloat16() for key, tensor in one.tensors.items()})
        for name, one in library.items()
    }
    assert abs(MBCClusterer(5).fit(half).similarity_ - MBCClusterer(5).fit(library).similarity_).max() < 0.01

    def cosines(weight):
        vectors = np.stack(
            [
                np.concatenate([weight(module) ** 0.5 * part.ravel() for module, part in dense(one).items()])
                for one in library.values()
            ]
        )
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors @ vectors.T

    for options, weight in (
        ({"layers": [1]}, lambda module: 1.0 * (".1." in module)),
        ({"modules": ["q_proj", "self_attn.o_proj"]}, lambda module: 1.0 * module.endswith(("q_proj", "o_proj"))),
        (
            {"module_weights": {"v_proj": 3.0, 0: 0.5}},
            lambda m: (3.0 if "v_proj" in m else 1) * (0.5 if ".0." in m else 1),
        ),
    ):
        found = MBCClusterer(5, **options).fit(library)
        np.testing.assert_allclose(found.similarity_, cosines(weight), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_clusters": 7}, "n_clusters=7 is more than there are to cluster: n_samples=4"),
        ({"n_clusters": 0}, "n_clusters=0 is not allowed; it is a whole number of at least 1 or 'auto'"),
        ({"embedding": "weights"}, "embedding='weights' is unknown; allowed are 'delta', 'paper'"),
        ({"grouping": "kmeans"}, "grouping='kmeans' is unknown"),
        ({"pairs": "all"}, "pairs='all' is unknown"),
        ({"layers": []}, "layers is empty"),
        ({"modules": ["up_proj"]}, "has none of the modules that layers, modules and module_weights leave"),
        ({"module_weights": {"q_proj": -1}}, "it is a finite number, at least 0"),
        ({"sparsity_threshold": 1.0}, "sparsity_threshold=1.0 is not allowed"),
        ({"embedding": "paper", "pairs": "sketch"}, "are for embedding='delta'"),
        ({"embedding": "paper"}, r"embedding='delta' compares any adapters"),
    ],
)
def test_bad_arguments(options, message):
    library = AdapterLibrary([random_adapter(f"a{rank}", rank, rank) for rank in (2, 3, 4, 5)])
    with pytest.raises(ValueError, match=message):
        MBCClusterer(**{"n_clusters": 2, **options}).fit(library)


def test_bad_adapters():
    good = {f"a{seed}": random_adapter(f"a{seed}", seed) for seed in range(3)}
    first, second = sorted(pico_shapes())[:2]
    apart = {"x": random_adapter("x", 1, modules=[first]), "y": random_adapter("y", 2, modules=[second])}
    with pytest.raises(ValueError, match="adapter 'x' has no module in common with any other adapter"):
        MBCClusterer(1).fit(apart)
    zero = replace(good["a0"], tensors={key: 0 * tensor for key, tensor in good["a0"].tensors.items()})
    nan = replace(good["a0"], tensors={key: tensor * torch.nan for key, tensor in good["a0"].tensors.items()})
    for pairs in ("exact", "sketch"):
        with pytest.raises(ValueError, match="adapter 'bad': its whole update is zero"):
            MBCClusterer(2, pairs=pairs).fit({**good, "bad": zero})
        with pytest.raises(ValueError, match="adapter 'bad': its update holds NaN"):
            MBCClusterer(2, pairs=pairs).fit({**good, "bad": nan})
    with pytest.raises(ValueError, match="a library has one base model"):
        MBCClusterer(2).fit({**good, "bad": random_adapter("bad", 9, base_model_name_or_path="me/other")})
    fitted = MBCClusterer(2, modules=[first]).fit(good)
    with pytest.raises(ValueError, match="no module in common with the adapters that were clustered"):
        fitted.predict({"y": apart["y"]})
    with pytest.raises(ValueError, match="predict takes adapters too"):
        fitted.predict(np.eye(3))
    with pytest.raises(ValueError, match="needs at least 3"):
        MBCClusterer("auto").fit(AdapterLibrary(good).select(["a0", "a1"]))


def test_what_has_not_been_made_yet():
    fitted = MBCClusterer(2).fit({f"a{seed}": random_adapter(f"a{seed}", seed) for seed in range(3)})
    with pytest.raises(ValueError, match="call train_experts or merge_experts first"):
        fitted.push_to_hub("me/library")
    with pytest.raises(ValueError, match="datasets lacks 'a1'"):
        fitted.train_experts("base", {"a0": []}, output_dir="out")
    with pytest.raises(ValueError, match="pass library="):
        MBCClusterer(2).fit(np.eye(3)).merge_experts()
