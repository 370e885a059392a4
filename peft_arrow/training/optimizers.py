"""AdamW with a learning rate of its own for weights over experts or skills."""

from __future__ import annotations

from collections.abc import Callable

import torch
from trl import SFTConfig


# mttl's for the weights over skills, far above that of the skills.
ROUTER_LEARNING_RATE = 0.1


def two_rates(model: torch.nn.Module, arguments: SFTConfig, is_router: Callable[[str], bool]) -> torch.optim.Optimizer:
    """AdamW over what is trained: `ROUTER_LEARNING_RATE` for the parameters that `is_router` names, else the usual."""
    groups: tuple[list, list] = ([], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[is_router(name)].append(parameter)
    return torch.optim.AdamW(
        [{"params": groups[False]}, {"params": groups[True], "lr": ROUTER_LEARNING_RATE}],
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        weight_decay=arguments.weight_decay,
    )
