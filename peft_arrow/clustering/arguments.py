"""What the arguments of `MBCClusterer` may be."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any


CHOICES = {
    "embedding": ("delta", "paper"),
    "grouping": ("average", "spectral"),
    "pairs": ("auto", "exact", "sketch"),
}


def check_arguments(estimator: Any) -> None:
    """Raise a `ValueError` that names the argument, its value and what is allowed."""
    for name, allowed in CHOICES.items():
        value = getattr(estimator, name)
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown; allowed are {', '.join(map(repr, allowed))}.")
    for name, least in (("n_clusters", 1), ("sketch_dim", 2), ("max_clusters", 2)):
        value = getattr(estimator, name)
        if not (name == "n_clusters" and isinstance(value, str) and value == "auto"):
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                also = " or 'auto'" if name == "n_clusters" else ""
                raise ValueError(f"{name}={value!r} is not allowed; it is a whole number of at least {least}{also}.")
    sparsity = estimator.sparsity_threshold
    if isinstance(sparsity, bool) or not isinstance(sparsity, Real) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity_threshold={sparsity!r} is not allowed; it is a number from 0 to below 1.")
    if estimator.embedding == "paper" and estimator.module_weights:
        raise ValueError("module_weights is for embedding='delta'; the paper's recipe has no weights.")
    if estimator.embedding == "paper" and (estimator.pairs == "sketch" or estimator.grouping != "average"):
        raise ValueError("pairs='sketch' and grouping='spectral' are for embedding='delta'; the paper has its own.")


def group_counts(estimator: Any, count: int) -> list[int]:
    """The numbers of clusters to try for so many things: one, or for `"auto"` 2 and more.

    Raises:
        ValueError: there are fewer than clusters, or too few to choose a number for.
    """
    if estimator.n_clusters == "auto":
        if count < 3:
            raise ValueError(
                f"n_clusters='auto' compares numbers from 2 to one less than there are; n_samples={count} is too few: "
                "it needs at least 3."
            )
        return list(range(2, min(estimator.max_clusters, count - 1) + 1))
    if count < estimator.n_clusters:
        raise ValueError(
            f"n_clusters={estimator.n_clusters} is more than there are to cluster: n_samples={count}; ask for at most "
            f"{count} clusters."
        )
    return [int(estimator.n_clusters)]
