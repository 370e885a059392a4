"""What prompt-level routers learn: a classifier over prompts, or the prompts themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from .fitted import Fitted, fitted_head
from .heads import PromptHead
from .rows import Example, batches


@torch.no_grad()
def prompt_table(
    model: Any, examples: Mapping[str, Sequence[Example]], batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of all prompts, float64 (N, F), and the positions of their experts (N,)."""
    names, device = list(model.expert_names), next(model.model.parameters()).device
    rows = [(Example(e.ids[: e.prompt], e.prompt), names.index(name)) for name, some in examples.items() for e in some]
    found = []
    progress = tqdm(total=len(rows), desc="prompts", unit="row")
    with progress:
        for ids, mask, _ in batches([example for example, _ in rows], batch_size, device):
            found.append(model.prompt_features({"input_ids": ids}, mask).double().cpu())
            progress.update(len(ids))
    return torch.cat(found), torch.tensor([owner for _, owner in rows])


def train_predictor(
    model: Any, examples: Mapping[str, Sequence[Example]], *, weight_decay: float = 1e-2, batch_size: int = 8
) -> Fitted:
    """Multinomial logistic regression from prompts to experts (TP of arXiv 2405.11157, section 4.2), by L-BFGS.

    Features are centred and divided by their spread first; the map that is returned has that in it.

    Args:
        model (`ArrowLoraModel`): the routed model; its base encodes the prompts.
        examples (`Mapping`): expert -> rows, for every expert in order.
        weight_decay (`float`): half of it times the sum of the squared weights is added to the mean loss.
        batch_size (`int`): prompts at a time.

    Returns:
        `Fitted`: the map, and its accuracy on the prompts it was trained on.
    """
    features_NF, owners_N = prompt_table(model, examples, batch_size)
    center_F = features_NF.mean(0)
    spread_F = features_NF.std(0, correction=0).clamp_min(1e-8)
    x_NF = (features_NF - center_F) / spread_F
    weight = torch.zeros(len(examples), x_NF.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(examples), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits_NE = x_NF @ weight.T + bias
        loss = torch.nn.functional.cross_entropy(logits_NE, owners_N) + 0.5 * weight_decay * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    weight, bias = weight.detach(), bias.detach()
    accuracy = ((x_NF @ weight.T + bias).argmax(-1) == owners_N).double().mean().item()
    head = PromptHead(len(examples), x_NF.shape[1], is_cosine=False)
    return fitted_head(head.fill(weight / spread_F, bias, center_F), train_accuracy=round(accuracy, 4))


def nearest_examples(model: Any, examples: Mapping[str, Sequence[Example]], *, batch_size: int = 8) -> Fitted:
    """The prompts' features minus their mean, at length 1, and the position of each one's expert.

    Args:
        model (`ArrowLoraModel`): the routed model; its base encodes the prompts.
        examples (`Mapping`): expert -> rows, for every expert in order.
        batch_size (`int`): prompts at a time.
    """
    features_NF, owners_N = prompt_table(model, examples, batch_size)
    center_F = features_NF.mean(0)
    rows_NF = torch.nn.functional.normalize(features_NF - center_F, dim=-1)
    head = PromptHead(*rows_NF.shape, is_cosine=True)
    return fitted_head(head.fill(rows_NF, torch.zeros(len(rows_NF)), center_F), owners=owners_N.tolist())
