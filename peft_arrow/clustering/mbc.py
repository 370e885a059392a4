"""Model-Based Clustering as a scikit-learn estimator: adapters in, clusters out, and a smaller library of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from ..library.library import AdapterLibrary
from . import grouping
from .arguments import check_arguments, group_counts
from .compare import Compared, centroids, compare_adapters, compare_rows
from .merging import merge_clusters
from .paper import paper_labels
from .pictures import draw_all
from .selection import ModuleChoice, common_shapes, module_choice
from .similarity import unit_rows
from .sketch import DeltaSketch, sketch_adapters
from .sources import as_library, is_adapters
from .summary import told_of_clustering


FLOATS = (np.float64, np.float32)


class MBCClusterer(ClusterMixin, BaseEstimator):
    """Groups LoRA adapters by their weights. Ostapenko et al. 2024, https://arxiv.org/abs/2405.11157, section 3.

    Args:
        n_clusters (`int` or `"auto"`): how many; `"auto"`: the number, 2 to `max_clusters`, of the largest silhouette.
        embedding (`str`):
            `"delta"`: cosines of the updates delta-W, exact for adapters of any ranks, seeds and authors.
            `"paper"`: the authors' recipe on the numbers of lora_A and lora_B; needs equal shapes, and means something
            only where all adapters share one initialisation.
        random_state (`int`, `RandomState` or None): of the sketch, the spectral embedding and the paper's recipe.
        grouping (`str`): `"average"` linkage or `"spectral"`, for `"delta"`; docs/clustering.md compares them.
        layers (iterable of `int`, *optional*): only these layers; default all.
        modules (iterable of `str`, *optional*): only modules of these names or last parts of names; default all.
        module_weights (`Mapping`, *optional*):
            Last parts of a name, or a layer's number, -> factor of the module's inner products; 1 where none fits.
        pairs (`str`): `"exact"`, `"sketch"` or `"auto"`: exact for up to 1,000 adapters. For `embedding="delta"`.
        sketch_dim (`int`): numbers a sketch; the standard error of a cosine is at most sqrt(8 / sketch_dim).
        max_clusters (`int`): the most that `n_clusters="auto"` tries.
        sparsity_threshold (`float`): of the paper's recipe; mttl's `mbc_clustering.py` has 0.5.
        base_model, token, revision: for references; see `AdapterLibrary.from_pretrained`.

    Attributes:
        labels_ (`np.ndarray`): (N,), in the order of `names_`.
        names_ (`list[str]`): the adapters as they were given; numbers of rows for an array.
        clusters_ (`dict[str, list[str]]`): `"cluster_0"` ... -> names, sorted.
        n_clusters_ (`int`): how many; fewer than asked for where `"paper"` finds too few that differ.
        similarity_ (`np.ndarray`): (N, N), in the order of `names_`.
        silhouette_ (`float`): mean silhouette on 1 - similarity; NaN for one cluster or one adapter a cluster.
        centroids_ (`np.ndarray`): (n_clusters_, F): means of the members' sketches, or rows, at length 1.
        library_ (`AdapterLibrary`): what `merge_experts` or `train_experts` made last.
        lost_norm_ (`dict[str, float]`): of `merge_experts`: cluster -> share of the norm that the rank cut off.
    """

    def __init__(
        self,
        n_clusters: int | str = 10,
        *,
        embedding: str = "delta",
        random_state: Any = 42,
        grouping: str = "average",
        layers: Iterable[int] | None = None,
        modules: Iterable[str] | None = None,
        module_weights: Mapping[str | int, float] | None = None,
        pairs: str = "auto",
        sketch_dim: int = 16384,
        max_clusters: int = 30,
        sparsity_threshold: float = 0.5,
        base_model: str | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.embedding = embedding
        self.random_state = random_state
        self.grouping = grouping
        self.layers = layers
        self.modules = modules
        self.module_weights = module_weights
        self.pairs = pairs
        self.sketch_dim = sketch_dim
        self.max_clusters = max_clusters
        self.sparsity_threshold = sparsity_threshold
        self.base_model = base_model
        self.token = token
        self.revision = revision

    def fit(self, X: Any, y: Any = None) -> MBCClusterer:
        """Cluster adapters, or the rows of an array.

        Args:
            X: an `AdapterLibrary`, a reference to one, a list of references, a dict name -> reference, or an array of
                features (N, F), whose rows are compared by their cosine.
            y: not used; scikit-learn's.

        Raises:
            ValueError: an argument is not allowed, adapters do not go together, or there are fewer than clusters.
        """
        check_arguments(self)
        for name in ("library_", "lost_norm_", "n_features_in_", "feature_names_in_"):
            vars(self).pop(name, None)  # of an earlier fit
        given = isinstance(self.random_state, Integral)
        self._seed = int(self.random_state if given else check_random_state(self.random_state).randint(2**31))
        if is_adapters(X):
            library = as_library(X, **self._hub_options())
            self._group(self._fit_adapters(library), list(library))
        else:
            compared = self._fit_rows(validate_data(self, X, dtype=FLOATS))
            self._group(compared, list(compared.names))
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The cluster of each adapter, or row: the one whose members are the most alike on average, by the sketches.

        The adapters that were clustered are not needed. A cosine by sketches has a standard error of at most
        sqrt(8 / sketch_dim), for adapters of many modules about sqrt(1 / sketch_dim): `sketch_error`.

        Raises:
            ValueError: an adapter has no module in common with those that were clustered, or is zero.
        """
        check_is_fitted(self, "centroids_")
        if self._shapes is None:
            rows = unit_rows(validate_data(self, X, dtype=FLOATS, reset=False))
            return (rows @ self.centroids_.T).argmax(axis=1)
        if not is_adapters(X):
            raise ValueError("adapters were clustered; predict takes adapters too, not an array.")
        library = as_library(X, **self._hub_options())
        choice = self._choice()
        for name, adapter in library.items():
            if not self._shapes & choice.shapes(adapter):
                raise ValueError(f"adapter {name!r} has no module in common with the adapters that were clustered.")
        sketch = self._sketch(choice)
        scores = [sketch_adapters([adapter], sketch)[0] @ self.centroids_.T for adapter in library.values()]
        return np.argmax(scores, axis=1)

    def merge_experts(self, rank: int | None = None, *, library: Any = None) -> AdapterLibrary:
        """One expert a cluster, from its members alone: the truncated SVD of the mean of their updates.

        Args:
            rank (`int`, *optional*): of every expert; by default its largest member's.
            library (*optional*): the adapters again, where the estimator was unpickled.

        Returns:
            `AdapterLibrary`: experts `cluster_0` ... in memory; `lost_norm_` tells what the rank cut off of each.

        Raises:
            ValueError: an array was clustered, or members hold more than low-rank updates.
        """
        check_is_fitted(self, "clusters_")
        adapters = self._library if library is None else as_library(library, **self._hub_options())
        if adapters is None:
            raise ValueError(
                "the adapters are not at hand: fit was given an array, or the estimator was unpickled; pass library=."
            )
        self.library_, self.lost_norm_ = merge_clusters(adapters, self.clusters_, rank, told_of_clustering(self))
        return self.library_

    def train_experts(
        self,
        base: Any,
        datasets: Mapping[str, Any],
        *,
        output_dir: str | PathLike,
        sft_config: Any = None,
        lora_config: Any = None,
        **options: Any,
    ) -> AdapterLibrary:
        """One expert a cluster, trained with TRL on the data of its members; see `peft_arrow.training.train_groups`.

        Args:
            base: a model, or its Hub id or folder.
            datasets (`Mapping`): name of each clustered adapter -> its training data.
            output_dir (`str` or `PathLike`): where experts are written; complete ones are not trained again.
            sft_config, lora_config (*optional*): TRL's and PEFT's configs.
            options: further arguments of `train_groups`.

        Raises:
            ValueError: data of a clustered adapter is missing.
            ImportError: TRL is missing; the message names the extra.
        """
        check_is_fitted(self, "clusters_")
        missing = [name for name in self.names_ if name not in datasets]
        if missing:
            raise ValueError(f"datasets lacks {missing[0]!r}; it needs the data of every clustered adapter.")
        from ..training import train_groups

        made = {"made with": "MBCClusterer(...).fit(...).train_experts(...)", "clustering": told_of_clustering(self)}
        options = {"sft_config": sft_config, "lora_config": lora_config, "made": made, **options}
        self.library_ = train_groups(base, self.clusters_, datasets, output_dir=output_dir, **options)
        return self.library_

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Push the library that was made last; arguments as in `AdapterLibrary.push_to_hub`.

        Raises:
            ValueError: none was made since the last fit.
        """
        if not hasattr(self, "library_"):
            raise ValueError("there is no library to push yet: call train_experts or merge_experts first.")
        return self.library_.push_to_hub(repo_id, **options)

    def plot(self, folder: str | PathLike) -> dict[str, Path]:
        """Draw `similarity.png`, `map.png` and `dendrogram.png` into a folder; returns name -> file.

        Raises:
            ImportError: matplotlib is missing; the message names the extra.
        """
        check_is_fitted(self, "clusters_")
        return draw_all(self.names_, self.labels_, self.similarity_, self.silhouette_, Path(folder))

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {**state, "_library": None} if "_library" in state else state  # predict does without their weights

    def _fit_adapters(self, library: AdapterLibrary) -> Compared:
        """Sorted by name, as the paper's authors do, so that the order in the library decides nothing."""
        group_counts(self, len(library))
        choice = self._choice()
        self._library = library.select(sorted(library))
        self._shapes = common_shapes(self._library, choice)
        options = {"embedding": self.embedding, "pairs": self.pairs, "sparsity": self.sparsity_threshold}
        return compare_adapters(self._library, choice=choice, sketch=self._sketch(choice), **options)

    def _fit_rows(self, rows: np.ndarray) -> Compared:
        group_counts(self, len(rows))
        self._library = self._shapes = None
        return compare_rows(rows, embedding=self.embedding, sparsity=self.sparsity_threshold, seed=self._seed)

    def _group(self, compared: Compared, given: list[str]) -> None:
        """Fill the attributes, in the order of the given names."""
        similarity, counts = compared.similarity, group_counts(self, len(compared.names))
        labeller = self._labeller(similarity)
        count = counts[0] if len(counts) == 1 else grouping.best_count(labeller, similarity, counts)
        # k-means finds fewer clusters where fewer adapters differ; their numbers then have no gaps
        labels = np.unique(labeller(count), return_inverse=True)[1]
        self.n_clusters_ = int(labels.max()) + 1
        self.centroids_ = centroids(compared, labels, self._library, self._sketch(self._choice()))
        self.silhouette_ = grouping.silhouette(similarity, labels)
        place = {name: position for position, name in enumerate(compared.names)}
        order = np.array([place[name] for name in given])
        self.names_, self.labels_, self.similarity_ = given, labels[order], similarity[np.ix_(order, order)]
        self.clusters_ = {
            f"cluster_{label}": [compared.names[row] for row in np.flatnonzero(labels == label)]
            for label in range(self.n_clusters_)
        }

    def _labeller(self, similarity: np.ndarray) -> grouping.Labeller:
        if self.embedding == "paper":
            return lambda count: paper_labels(similarity, count, self._seed)
        if self.grouping == "spectral":
            return grouping.spectral_groups(similarity, self._seed)
        return grouping.average_groups(similarity)

    def _choice(self) -> ModuleChoice:
        return module_choice(self.layers, self.modules, self.module_weights)

    def _sketch(self, choice: ModuleChoice) -> DeltaSketch:
        return DeltaSketch(self.sketch_dim, self._seed, choice)

    def _hub_options(self) -> dict[str, Any]:
        return {"base_model": self.base_model, "token": self.token, "revision": self.revision}
