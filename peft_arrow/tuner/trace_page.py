"""A routing trace as one web page that needs nothing else: no network, no server, no file beside it."""

from __future__ import annotations

import base64
import html
import json
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .trace_rows import TracedRow, traced_rows
from .trace_stats import kind_of, layer_labels, layer_of


if TYPE_CHECKING:
    from .trace import RoutingTrace

TEMPLATE = "trace_page.html"
# With more experts a position does not fit into a byte, and equal weights would be rounded away.
MOST_NARROW = 64


def routing_html(
    trace: RoutingTrace, path: str | PathLike, tokenizer: Any = None, title: str = "Experts of each token"
) -> None:
    """Write the page: each text, and its layers by tokens, coloured by expert.

    Args:
        trace (`RoutingTrace`): the trace; decoding steps continue the rows of the call that began them.
        path (`str` or `PathLike`): the file to write.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): turns ids into text; without it the ids are shown.
        title (`str`): the page's.
    """
    template = resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    # In a script element nothing is markup but "<", which begins its end.
    data = json.dumps(page_data(trace, tokenizer), separators=(",", ":")).replace("<", "\\u003c")
    parts = [part.replace("{{title}}", html.escape(title)) for part in template.split("{{data}}")]
    Path(path).write_text(data.join(parts), encoding="utf-8")


def page_data(trace: RoutingTrace, tokenizer: Any = None) -> dict[str, Any]:
    """What the page's script reads.

    The indices and weights of a row are base64 of unsigned little-endian integers of `bytes` bytes each, modules by
    tokens by K: the weight 1 is the largest integer, the index -1 too.
    """
    rows = traced_rows(trace, tokenizer)
    modules = list(dict.fromkeys(name for row in rows for name in row.top_k_index))
    layers = list(dict.fromkeys(map(layer_of, modules)))
    kinds = list(dict.fromkeys(map(kind_of, modules)))
    width = 1 if len(trace.expert_names) <= MOST_NARROW else 2
    return {
        "experts": list(trace.expert_names),
        "layers": layer_labels(layers),
        "kinds": kinds,
        "modules": [[layers.index(layer_of(name)), kinds.index(kind_of(name))] for name in modules],
        "bytes": width,
        "rows": [_row_data(row, modules, width) for row in rows],
    }


def _row_data(row: TracedRow, modules: list[str], width: int) -> dict[str, Any]:
    length = len(row.tokens)
    top_k = max((index.shape[-1] for index in row.top_k_index.values()), default=1)
    index_MTK = torch.full((len(modules), length, top_k), -1, dtype=torch.int64)
    weights_MTK = torch.zeros(len(modules), length, top_k, dtype=torch.float64)
    for position, name in enumerate(modules):
        if name in row.top_k_index:
            found = row.top_k_index[name]
            index_MTK[position, :, : found.shape[-1]] = found
            weights_MTK[position, :, : found.shape[-1]] = row.top_k_weights[name]
    largest = 256**width - 1
    integers = (weights_MTK.nan_to_num(0.0).clamp(0, 1) * largest).round()
    return {
        "title": row.title,
        "tokens": row.tokens,
        "ids": row.token_ids,
        "prompt": row.num_prompt_tokens,
        "k": top_k,
        "index": _base64(torch.where(index_MTK < 0, largest, index_MTK), width),
        "weights": _base64(integers, width),
    }


def _base64(values: torch.Tensor, width: int) -> str:
    return base64.b64encode(values.numpy().astype(f"<u{width}").tobytes()).decode("ascii")
