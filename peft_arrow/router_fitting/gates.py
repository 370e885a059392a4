"""PHATGOOSE's gates: one vector an expert and module, trained with everything else frozen."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import cross_entropy, layer_norm
from tqdm.auto import tqdm
from transformers import get_linear_schedule_with_warmup

from .fitted import Fitted
from .rows import Example, batches


def train_gates(
    model: Any,
    examples: Mapping[str, Sequence[Example]],
    *,
    steps: int = 100,
    learning_rate: float = 1e-3,
    batch_size: int = 4,
    seed: int = 0,
) -> Fitted:
    """Train the gate g of each expert alone: its output is weighed by sigmoid(g . x) (arXiv 2402.05859, section 3).

    The gates begin at zero; AdamW without decay, 10 % of warm-up, then linear decay, the loss of the completions.
    The paper trains 100 steps.

    Args:
        model (`ArrowLoraModel`): the routed model; only the gates get gradients.
        examples (`Mapping`): expert -> rows, for every expert in order.
        steps (`int`): for each expert.
        learning_rate (`float`): the largest.
        batch_size (`int`): rows a step.
        seed (`int`): of the order of the rows.

    Returns:
        `Fitted`: with the rows, normalised as LN(g).
    """
    adapter_name, names = model.active_arrow_adapter(), list(model.expert_names)
    layers = model.routed_layers(adapter_name)
    rows = {
        name: torch.zeros(len(layer.experts[adapter_name].positions), layer.in_features)
        for name, layer in layers.items()
    }
    with tqdm(total=steps * len(names), desc="gates", unit="step") as bar, _frozen(model):
        for expert, expert_rows in examples.items():
            position = names.index(expert)
            bar.set_postfix_str(expert)
            gates = _train_one(
                model, layers, adapter_name, position, expert_rows, bar, steps, learning_rate, batch_size, seed
            )
            for name, gate_I in gates.items():
                row = layers[name].experts[adapter_name].positions.index(position)
                rows[name][row] = gate_I
    return Fitted({name: layer_norm(gates_EI, gates_EI.shape[-1:]) for name, gates_EI in rows.items()})


def _train_one(model, layers, adapter_name, position, rows, bar, steps, learning_rate, batch_size, seed):
    """The gates of one expert: module -> (I,)."""
    device = next(model.model.parameters()).device
    gates = {
        name: torch.nn.Parameter(torch.zeros(layer.in_features, device=device))
        for name, layer in layers.items()
        if position in layer.experts[adapter_name].positions
    }
    optimizer = torch.optim.AdamW(gates.values(), lr=learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, max(1, steps // 10), steps)
    name_of = {id(layer): name for name, layer in layers.items()}

    def gating(layer, x_TI, weights_TK):
        return weights_TK * torch.sigmoid(x_TI.float() @ gates[name_of[id(layer)]]).unsqueeze(-1)

    chosen = [layers[name] for name in gates]
    expert = model.expert_names[position]
    order = _order(rows, steps * batch_size, seed)
    try:
        for layer in chosen:
            layer.gating = gating
        for ids, mask, prompt in batches(order, batch_size, device):
            with model.pin_experts([expert] * len(ids)), torch.enable_grad():
                logits = model.model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1].float()
                labels = ids.masked_fill(~mask | prompt, -100)[:, 1:]
                cross_entropy(logits.transpose(1, 2), labels).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.update()
    finally:
        for layer in chosen:
            layer.gating = None
    return {name: gate.detach().cpu() for name, gate in gates.items()}


def _order(rows: Sequence[Example], count: int, seed: int) -> list[Example]:
    """`count` rows: all of them in a random order, again and again."""
    generator, order = random.Random(seed), []
    while len(order) < count:
        order += generator.sample(list(rows), len(rows))
    return order[:count]


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """While open, no parameter of the model takes gradients and dropout is off."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        model.eval()
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode
