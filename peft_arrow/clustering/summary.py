"""A clustering as text, as JSON, and as a card tells it."""

from __future__ import annotations

import math
import textwrap
from typing import Any


WIDTH = 110
# The arguments that a card tells, where they are not None.
TOLD = ("embedding", "grouping", "layers", "modules", "module_weights", "pairs", "sparsity_threshold")


def clusters_record(clusterer: Any) -> dict[str, Any]:
    """What a fitted `MBCClusterer` found, as JSON has it; `lost_norm` only where experts were merged."""
    record = {
        "clusters": clusterer.clusters_,
        "n_clusters": clusterer.n_clusters_,
        "silhouette": None if math.isnan(clusterer.silhouette_) else clusterer.silhouette_,
        "embedding": clusterer.embedding,
    }
    lost = getattr(clusterer, "lost_norm_", None)
    return {**record, "lost_norm": lost} if lost else record


def clusters_table(clusterer: Any) -> str:
    """One paragraph a cluster: its members, the mean cosine of their pairs, and what merging lost."""
    silhouette = "" if math.isnan(clusterer.silhouette_) else f", silhouette {clusterer.silhouette_:.3f}"
    lines = [f"{len(clusterer.names_)} adapters in {clusterer.n_clusters_} clusters{silhouette}.", ""]
    lost = getattr(clusterer, "lost_norm_", {})
    for number, (cluster, members) in enumerate(clusterer.clusters_.items()):
        rows = [place for place, label in enumerate(clusterer.labels_) if label == number]
        told = [f"{len(members)} adapter{'s' if len(members) > 1 else ''}"]
        if len(rows) > 1:
            inner = clusterer.similarity_[rows][:, rows]
            mean = (inner.sum() - inner.trace()) / (len(rows) * (len(rows) - 1))
            told.append(f"mean cosine {mean:.3f}")
        if cluster in lost:
            told.append(f"merging lost {100 * lost[cluster]:.1f} % of the norm")
        lines.append(f"{cluster}: {', '.join(told)}")
        lines += textwrap.wrap(", ".join(members), WIDTH, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines)


def told_of_clustering(clusterer: Any) -> dict[str, Any]:
    """What a card tells of a fitted `MBCClusterer`: what was compared and how, the seed, and the silhouette."""
    options = {name: value for name, value in clusterer.get_params().items() if name in TOLD and value is not None}
    options = {name: value if isinstance(value, (str, int, float)) else repr(value) for name, value in options.items()}
    silhouette = None if math.isnan(clusterer.silhouette_) else round(clusterer.silhouette_, 4)
    return {**options, "n_clusters": clusterer.n_clusters_, "seeds": [clusterer._seed], "silhouette": silhouette}
