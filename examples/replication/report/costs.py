"""What a stage costs, and the same for 256 tasks on a 7B model, by arithmetic that is shown."""

from __future__ import annotations

from typing import Any


PARAMETERS = 134.5e6  # SmolLM2-135M, without counting its tied head twice
LARGE = 7.24e9  # Mistral-7B
TASKS, LARGE_TASKS = 44, 256
# Forward 2 and backward 2 floating-point operations a parameter and token: frozen weights need no gradients.
TRAINING, READING = 4, 2
A100 = 312e12  # bfloat16, dense
USE = 0.4  # of the peak, as usual for training


def scale(costs: dict[str, Any]) -> list[dict[str, Any]]:
    """Each training stage with its FLOPs here, and for 256 tasks on 7B the FLOPs and the hours of an A100 at 40 %."""
    found = []
    for stage, cost in costs.items():
        if "tokens" not in cost:
            continue
        here = TRAINING * PARAMETERS * cost["tokens"]
        there = TRAINING * LARGE * cost["tokens"] * LARGE_TASKS / TASKS
        found.append(
            {
                "stage": stage,
                "flops": here,
                "rate": here / max(cost["seconds"], 1),
                "large_tokens": cost["tokens"] * LARGE_TASKS / TASKS,
                "large_flops": there,
                "large_hours": there / (A100 * USE) / 3600,
            }
        )
    return found
