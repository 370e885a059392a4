"""Rows of a library's card, each made of one entry of its manifest."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import quote

from huggingface_hub import EvalResult

from .card_parts import NOT_STATED, joined, license_label
from .links import dataset_id, hub_link
from .manifest import EXPERTS_FOLDER, Evaluation, ExpertRecord
from .markdown import code, inline, plain
from .names import slug


# Loaders of `datasets` that trainers write into cards where the data had no name.
_LOADERS = {"arrow", "csv", "generator", "imagefolder", "json", "pandas", "parquet", "text", "webdataset"}


def expert_row(record: ExpertRecord) -> dict[str, str]:
    """One line of the table of experts."""
    return {
        "name": f"[{code(record.name)}]({EXPERTS_FOLDER}/{quote(record.name)})",
        "task": inline(record.origin.task or "") or NOT_STATED,
        "rank": str(record.rank),
        "alpha": f"{record.alpha:g}",
        "modules": joined(record.target_modules) or NOT_STATED,
        "size": _human_size(record.size),
        "license": license_label(record.origin.license),
        "source": source_link(record.origin.source, record.origin.commit),
    }


def source_link(source: str | None, commit: str | None = None) -> str:
    """Where an expert is from, linked where it is on the Hub."""
    return hub_link(source, commit) if source else NOT_STATED


def _human_size(size: float) -> str:
    if size < 1000:
        return f"{size} bytes"
    for unit in ("kB", "MB"):
        size /= 1000
        if size < 1000:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} GB"


def named_datasets(experts: Iterable[ExpertRecord]) -> list[str]:
    """What the experts' makers name as training data, each once, in order."""
    named = dict.fromkeys(name for record in experts for name in record.origin.datasets)
    return [name for name in named if name.strip() and name not in _LOADERS]


def evaluation_row(entry: Evaluation) -> dict[str, str]:
    """One line of the table of measured figures."""
    linked = dataset_id(entry.dataset_id)
    name = inline(entry.dataset) or NOT_STATED
    return {
        "dataset": f"{name} ({hub_link(linked, kind='datasets/')})" if linked else name,
        "split": inline(entry.split or "") or NOT_STATED,
        "metric": inline(entry.metric) or NOT_STATED,
        "method": inline(entry.method or "") or NOT_STATED,
        "value": f"{entry.value:.6g}",
    }


def eval_result(entry: Evaluation) -> EvalResult:
    """A measured figure for the `model-index` of the metadata."""
    name, metric = (metadata(text) or "not stated" for text in (entry.dataset, entry.metric))
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset_id(entry.dataset_id) or metadata(slug(name)),
        dataset_name=name,
        dataset_split=metadata(entry.split or "") or None,
        metric_type=metadata(slug(metric)),
        metric_value=entry.value,
        metric_name=f"{metric} ({metadata(entry.method)})" if entry.method else None,
    )


def metadata(text: str) -> str:
    """A line for the front matter; no `---`, at which some readers end it wherever it stands."""
    return re.sub("--+", "-", plain(text, 80))
