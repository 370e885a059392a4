"""One call for all routers that need data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..routers import ROUTERS
from .centroids import centroids
from .fitted import Fitted
from .gates import train_gates
from .prompts import nearest_examples, train_predictor
from .rows import read_datasets, tokenizer_of


# Router -> what fits it, and how many rows of an expert it takes unless told otherwise.
FITS: dict[str, tuple[Callable[..., Fitted], int]] = {
    "centroid": (centroids, 100),
    "phatgoose": (train_gates, 1000),
    "task_predictor": (train_predictor, 200),
    "retrieval": (nearest_examples, 32),
}


def fit(
    model: Any,
    name: str,
    datasets: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    max_rows: int | None = None,
    max_length: int = 512,
    **options: Any,
) -> Fitted:
    """Collect from data what a router needs; the model is left as it was.

    Args:
        model (`ArrowLoraModel`): the routed model.
        name (`str`): a router with `needs_data`.
        datasets (`Mapping`): expert -> rows, see `ArrowLoraModel.fit_router`.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): by default that of the base's name.
        max_rows (`int`, *optional*): rows taken of each expert, the first ones.
        max_length (`int`): tokens of a row; longer ones lose their beginning.
        options: of the router's own fit: `batch_size`, and `pool` (centroid), `steps`, `learning_rate`, `seed`
            (phatgoose), `weight_decay` (task_predictor).

    Raises:
        ValueError: the router needs no data, rows are missing or of another form, or an option is unknown.
    """
    if not ROUTERS[name].needs_data:
        needing = [router for router, row in ROUTERS.items() if row.needs_data]
        raise ValueError(f"name={name!r} needs no data; routers that do are {needing}.")
    make, rows = FITS[name]
    allowed = [key for key, p in inspect.signature(make).parameters.items() if p.kind is p.KEYWORD_ONLY]
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ValueError(f"fit_router got an unknown option {unknown[0]!r}; {name!r} takes {allowed}.")
    rows = rows if max_rows is None else max_rows
    for argument, value in (("max_rows", rows), ("max_length", max_length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{argument}={value!r} is not allowed; it is a whole number of at least 1.")
    experts = list(model.expert_names)
    tokenizer = tokenizer if tokenizer is not None else tokenizer_of(model.model)
    examples = read_datasets(datasets, experts, tokenizer, rows, max_length)
    fitted = make(model, examples, **options)
    counts = {expert: len(found) for expert, found in examples.items()}
    return replace(fitted, info={**fitted.info, "rows": counts, "options": options})
