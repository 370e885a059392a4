"""A routing trace as a table, a heat map and a web page; nothing here runs a model."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from peft_arrow.tuner.trace import ModuleTrace, RoutingTrace, TraceStep

NAME_WIDTH = 28


def layer_of(module: str) -> str:
    """`module` up to its first number, "model.layers.0" of "model.layers.0.mlp.up_proj"; all of it without one."""
    parts = module.split(".")
    numbered = [position for position, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[0] + 1]) if numbered else module


def layer_labels(layers: Sequence[str]) -> list[str]:
    """`layers` without what all of them start with: "0", "1", ... for a plain decoder."""
    prefixes = {layer.rpartition(".")[0] for layer in layers}
    return [layer.rpartition(".")[2] for layer in layers] if len(prefixes) == 1 else list(layers)


def token_mask(step: TraceStep, shape: torch.Size) -> torch.Tensor:
    """Which tokens of a module's (B, S) are not padding, bool.

    The mask of a decoding step covers the cached tokens too, so its end is taken. A module with another shape than the
    inputs (the decoder of an encoder-decoder) has no mask here, and all its tokens count.
    """
    mask = step.attention_mask
    if mask is None or mask.dim() != 2:
        return torch.ones(shape, dtype=torch.bool)
    length = mask.shape[1] if step.input_ids is None else step.input_ids.shape[1]
    mask = mask[:, -length:].bool().cpu()
    return mask if mask.shape == shape else torch.ones(shape, dtype=torch.bool)


def weight_sums(module: ModuleTrace, step: TraceStep, num_experts: int, rows: Sequence[int] | None) -> torch.Tensor:
    """Routing weight that each expert got from the tokens of one module, float64 (E,); `rows` None means all."""
    index, weights = module.top_k_index.cpu(), module.top_k_weights.cpu()
    chosen = (index >= 0) & token_mask(step, index.shape[:-1]).unsqueeze(-1)
    if rows is not None:
        chosen, index, weights = chosen[rows], index[rows], weights[rows]
    return torch.bincount(index[chosen], weights[chosen].double(), minlength=num_experts)


def routing_shares(trace: RoutingTrace, group: Any = layer_of, rows: Sequence[int] | None = None) -> dict[str, list]:
    """Each expert's share of the routing weight, per group of modules; the shares of a group sum to 1.

    Args:
        trace (`RoutingTrace`): the trace, all its steps.
        group (`Callable`): module name -> group; default: the layer.
        rows (`Sequence[int]`, *optional*): rows of the batch to count, default all.
    """
    sums: dict[str, torch.Tensor] = {}
    for step in trace.steps:
        for name, module in step.modules.items():
            found = weight_sums(module, step, len(trace.expert_names), rows)
            sums[group(name)] = sums[group(name)] + found if group(name) in sums else found
    return {name: (found / found.sum().clamp_min(1e-30)).tolist() for name, found in sums.items()}


def routing_table(trace: RoutingTrace) -> str:
    """The shares of the experts as text: over all modules, per kind of module, and per group of layers."""
    if not trace.steps:
        return "The trace holds no forward pass."
    kinds = routing_shares(trace, group=lambda name: name.rpartition(".")[2])
    overall = routing_shares(trace, group=lambda name: "all")
    layers = list(dict.fromkeys(layer_of(name) for step in trace.steps for name in step.modules))
    size = -(-len(layers) // 6)
    labels = layer_labels(layers)
    groups = {}
    for start in range(0, len(layers), size):
        last = min(start + size, len(layers)) - 1
        span = labels[start] if last == start else f"{labels[start]}-{labels[last]}"
        groups |= dict.fromkeys(layers[start : last + 1], span)
    by_layer = routing_shares(trace, group=lambda name: groups[layer_of(name)])
    head = "Share of the routing weight in percent, padding left out."
    first = _shares_block("by kind of module", trace.expert_names, overall | kinds)
    return "\n".join([head, "", first, "", _shares_block("by layer", trace.expert_names, by_layer)])


def _shares_block(title: str, experts: Sequence[str], columns: dict[str, list]) -> str:
    width = {name: max(6, len(name) + 1) for name in columns}
    lines = [title.ljust(NAME_WIDTH) + "".join(name.rjust(width[name]) for name in columns)]
    for position, expert in enumerate(experts):
        cells = (f"{100 * shares[position]:.1f}".rjust(width[name]) for name, shares in columns.items())
        lines.append(expert[: NAME_WIDTH - 1].ljust(NAME_WIDTH) + "".join(cells))
    return "\n".join(lines)


def plot_routing(trace: RoutingTrace, path: str | Path) -> None:
    """Draw the experts' shares per layer, layers down and experts across, to `path` (PNG, PDF or SVG)."""
    shares = routing_shares(trace)
    draw_heat_map(
        list(shares.values()),
        path,
        title="Share of the routing weight per layer",
        columns=("expert", trace.expert_names),
        rows=("layer", layer_labels(list(shares))),
    )


def draw_heat_map(
    values: Sequence[Sequence[float]],
    path: str | Path,
    *,
    title: str,
    columns: tuple[str, Sequence[str]],
    rows: tuple[str, Sequence[str]],
    annotate: bool = False,
    framed: Sequence[tuple[int, int]] = (),
) -> None:
    """One heat map of shares from 0 to 1; `columns` and `rows` are an axis label and its ticks; `framed` are cells.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    height, width = 1.8 + 0.24 * len(rows[1]), 3.2 + (0.55 if annotate else 0.42) * len(columns[1])
    figure = new_figure(max(width, 5.0), max(height, 3.0))
    axes = figure.subplots()
    top = max(max(row) for row in values)
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    axes.set_title(title, wrap=True)
    axes.set_xlabel(columns[0])
    axes.set_ylabel(rows[0])
    axes.set_xticks(range(len(columns[1])), columns[1], rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows[1])), rows[1])
    if annotate:
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                color = "white" if value > 0.6 * top else "black"
                axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=color)
    axes.autoscale(False)
    for y, x in framed:
        corners = ((x - 0.5, x + 0.5, x + 0.5, x - 0.5, x - 0.5), (y - 0.5, y - 0.5, y + 0.5, y + 0.5, y - 0.5))
        axes.plot(*corners, color="tab:red", linewidth=1.5, clip_on=False)
    figure.colorbar(image, ax=axes, format=lambda value, _: f"{100 * value:.0f} %")
    figure.savefig(path, dpi=130)


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure in inches that belongs to no window and no global state.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = "drawing needs matplotlib, which is not installed: pip install 'peft-arrow[viz]'"
        raise ImportError(message) from error
    return Figure(figsize=(width, height), layout="constrained")


def routing_html(
    trace: RoutingTrace, path: str | Path, tokenizer: Any = None, labels: Sequence[str] | None = None
) -> None:
    """Write a page without external parts that colours each token by the expert with the most weight on it.

    Args:
        trace (`RoutingTrace`): the trace; decoding steps continue the rows of the call that began them.
        path (`str` or `Path`): the file to write.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): turns ids into text; without it the ids are shown.
        labels (`Sequence[str]`, *optional*): a heading for each row of the batch.
    """
    layers = list(dict.fromkeys(layer_of(name) for step in trace.steps for name in step.modules))
    body = []
    for call, steps in enumerate(_calls(trace.steps)):
        for row in range(_shape(steps[0])[0]):
            name = labels[row] if labels and row < len(labels) else f"call {call + 1}, row {row + 1}"
            tokens = [token for step in steps for token in _tokens(step, row, trace, layers, tokenizer)]
            body.append(f"<h2>{html.escape(name)}</h2>\n<p class='row'>{''.join(tokens)}</p>")
    legend = "".join(f"<span class='e{i}'>{html.escape(name)}</span> " for i, name in enumerate(trace.expert_names))
    colours = "\n".join(f".e{i} {{background: {_colour(i)}}}" for i in range(len(trace.expert_names)))
    names = json.dumps(["all", *layer_labels(layers)]).replace("<", "\\u003c")
    page = _PAGE.replace("@colours", colours).replace("@last", str(len(layers))).replace("@layers", names)
    page = page.replace("@legend", legend).replace("@body", "\n".join(body))
    Path(path).write_text(page, encoding="utf-8")


def _calls(steps: Sequence[TraceStep]) -> Iterator[list[TraceStep]]:
    """Group the steps: one whose attention mask is longer than its input continues the step before it."""
    call: list[TraceStep] = []
    for step in steps:
        ids, mask = step.input_ids, step.attention_mask
        continues = ids is not None and mask is not None and mask.dim() == 2 and mask.shape[1] > ids.shape[1]
        if call and not (continues and _shape(step)[0] == _shape(call[0])[0]):
            yield call
            call = []
        call.append(step)
    if call:
        yield call


def _shape(step: TraceStep) -> torch.Size:
    """(B, S) of the first module; inputs without a batch dimension are one row."""
    shape = next(iter(step.modules.values())).top_k_index.shape[:-1]
    return torch.Size([1, *shape]) if len(shape) == 1 else shape


def _tokens(step: TraceStep, row: int, trace: RoutingTrace, layers: list[str], tokenizer: Any) -> Iterator[str]:
    """One span a token of `row`: text, class of its expert over all layers, expert of each layer, hover text."""
    shape = _shape(step)
    kept = token_mask(step, shape)[row]
    weights_LSE = torch.zeros(len(layers), shape[1], len(trace.expert_names), dtype=torch.float64)
    for name, module in step.modules.items():
        if module.top_k_index.numel() // module.top_k_index.shape[-1] == shape.numel():
            index = module.top_k_index.reshape(*shape, -1)[row].cpu()
            weights = module.top_k_weights.reshape(*shape, -1)[row].cpu().double()
            weights_LSE[layers.index(layer_of(name))].scatter_add_(1, index.clamp_min(0), weights)
    weights_LSE = weights_LSE / weights_LSE.sum(-1, keepdim=True).clamp_min(1e-30)
    for position in kept.nonzero().flatten().tolist():
        text = _token_text(step, row, position, tokenizer)
        weights_LE = weights_LSE[:, position]
        best = [int(weights_LE.mean(0).argmax()), *weights_LE.argmax(-1).tolist()]
        hover = "&#10;".join(_hover_lines(weights_LE, trace.expert_names, layer_labels(layers)))
        chosen = " ".join(str(expert) for expert in best)
        shown = html.escape(text).replace("\n", "\u21b5<br>")
        yield f"<span class='t e{best[0]}' data-e='{chosen}' title='{hover}'>{shown}</span>"


def _token_text(step: TraceStep, row: int, position: int, tokenizer: Any) -> str:
    if step.input_ids is None or step.input_ids.shape[1] <= position:
        return f"[{position}]"
    token = int(step.input_ids[row, position])
    return f"[{token}]" if tokenizer is None else tokenizer.decode([token])


def _hover_lines(weights_LE: torch.Tensor, experts: Sequence[str], labels: Sequence[str]) -> Iterator[str]:
    for label, weights_E in zip(["all", *labels], [weights_LE.mean(0), *weights_LE], strict=True):
        top = torch.topk(weights_E, min(3, len(experts)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        shown = ", ".join(f"{experts[index]} {value:.2f}" for index, value in pairs if value > 0)
        yield html.escape(f"layer {label}: {shown}", quote=True)


def _colour(position: int) -> str:
    return f"hsl({position * 137.508 % 360:.0f} {75 if position % 2 else 60}% {72 if position % 3 else 82}%)"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Expert of each token</title><style>
body {font: 16px/1.7 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222}
h2 {font-size: 1rem; margin: 1.2rem 0 0} .row {margin: .2rem 0; font-family: ui-monospace, monospace}
.t, .legend span {padding: .15rem .1rem; border-radius: .2rem; white-space: pre-wrap}
.legend span {padding: .2rem .5rem}
.controls {position: sticky; top: 0; background: #fff; padding: .6rem 0; border-bottom: 1px solid #ccc}
@colours
</style></head><body><h1>Expert of each token</h1>
<p>The colour of a token is the expert with the most routing weight on it, over all layers or in the layer that the
slider chooses. Hold the pointer over a token to see its largest weights in every layer. Padding is left out.</p>
<div class="controls"><label>Layer: <input id="layer" type="range" min="0" max="@last" value="0">
<output id="shown">all</output></label><p class="legend">@legend</p></div>
@body
<script>
const names = @layers;
document.getElementById("layer").addEventListener("input", event => {
  const layer = Number(event.target.value);
  document.getElementById("shown").textContent = names[layer];
  for (const token of document.querySelectorAll(".t")) token.className = "t e" + token.dataset.e.split(" ")[layer];
});
</script></body></html>
"""
