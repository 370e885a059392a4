"""Pictures of where the tokens of each task went."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..tuner.trace_pictures import draw_tasks, new_figure
from ..tuner.trace_stats import layer_labels
from .judge import encode
from .tasks import Row


FRAMED = "(red frame: the expert of the task's cluster)"


def draw_by_task(
    shares: Mapping[str, Mapping[str, list]], experts: Sequence[str], path: Path, own: Mapping[str, str]
) -> None:
    """Tasks down, experts across: the share of the routing weight, averaged over layers; a task's own is framed.

    Args:
        shares (`Mapping`): task -> layer -> share of each expert, in the order in which they are drawn.
        experts (`Sequence[str]`): the experts' names.
        path (`Path`): the picture.
        own (`Mapping[str, str]`): task -> its own expert, where it has one.
    """
    means = {
        task: [statistics.fmean(column) for column in zip(*layers.values(), strict=True)]
        for task, layers in shares.items()
    }
    draw_tasks(
        means, experts, path, own, title="Where the tokens of each task went:\nrouting weight in %, mean over layers"
    )


def draw_by_layer(
    shares: Mapping[str, Mapping[str, list]], experts: Sequence[str], path: Path, own: Mapping[str, str]
) -> None:
    """One heat map a task: layers across, experts down; arguments as in `draw_by_task`."""
    across = min(3, len(shares))
    down = -(-len(shares) // across)
    figure = new_figure(1.5 + 3.9 * across, 1.0 + (0.9 + 0.2 * len(experts)) * down)
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    image, top = None, max(share for layers in shares.values() for column in layers.values() for share in column)
    for axes, (task, layers) in zip(grid.flat, shares.items(), strict=False):
        values = [list(column) for column in zip(*layers.values(), strict=True)]
        image = axes.imshow(values, cmap="Blues", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
        axes.set_title(f"tokens of: {task}", fontsize=10)
        axes.set_yticks(range(len(experts)), experts, fontsize=8)
        labels = layer_labels(list(layers))
        ticks = range(0, len(labels), max(1, len(labels) // 6))
        axes.set_xticks(ticks, [labels[tick] for tick in ticks], fontsize=8)
        if task in own:
            row = list(experts).index(own[task])
            axes.axhspan(row - 0.5, row + 0.5, fill=False, edgecolor="tab:red", linewidth=1.5)
    for position, axes in enumerate(grid.flat):
        axes.set_visible(position < len(shares))
        axes.tick_params(labelbottom=position + across >= len(shares))
    figure.supxlabel("layer")
    figure.supylabel("expert (adapter)")
    figure.suptitle("Share of the routing weight of each expert in each layer" + (f" {FRAMED}" if own else ""))
    figure.colorbar(image, ax=grid, shrink=0.6, format=lambda value, _: f"{100 * value:.0f} %")
    figure.savefig(path, dpi=110)


def task_shares(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows_of: Mapping[str, Sequence[Row]]
) -> dict[str, dict[str, list]]:
    """For each task, layer -> share of each expert, over all tokens of its rows."""
    shares = {}
    for task, rows in tqdm(rows_of.items(), desc="drawing", unit="task"):
        with model.trace_routing() as trace:
            model(**encode(tokenizer, rows)[0], logits_to_keep=1)
        shares[task] = trace.shares()
    return shares
