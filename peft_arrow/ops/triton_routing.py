"""Arrow's routing on CUDA: the largest |x . v| of each token and the softmax over them, in one launch or two.

One launch, a program a token, where tokens and experts are so few that one program can read all prototypes; otherwise
one scores and one chooses. Scores are made of float32 prototypes and summed in float32. Inputs of 16 bits fit TF32
exactly, so their products are made of three TF32 products (`tf32x3`), which keep float32's digits on tensor cores;
inputs in float32 are multiplied without TF32.
"""

from __future__ import annotations

import torch

from .stack import PLAIN
from .triton_few import expand_few
from .triton_launch import ceil_div, check_triton, kernels, launch, power_of_two


MOST_CHOSEN = 32
# Up to so many scores a program takes one token; from then on tokens share reads of the prototypes. Not measured.
FEW_SCORES = 4096
# Up to so many experts one program scores them all and chooses.
FEW_EXPERTS = 32


def arrow_top_k(
    x_TI: torch.Tensor, prototypes_EI: torch.Tensor, top_k: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts with the largest |x . v_e| and the softmax at the temperature over them (arXiv 2405.11157, 4.1).

    Equals `ArrowRouter.score` and a `select` without mask, null expert, `top_p` and calibration. Of equal scores the
    expert that comes first is chosen. Weights have gradients to `x_TI`; prototypes are constants.

    Args:
        x_TI (`torch.Tensor`): layer inputs (T, I) in float32, bfloat16 or float16.
        prototypes_EI (`torch.Tensor`): float32 (E, I).
        top_k (`int`): experts kept for a token, 1 to 32; more than there are means all of them.
        temperature (`float`): divides the kept scores before the softmax; above 0.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: int64 (T, K) by falling score, and float32 (T, K).

    Raises:
        ImportError: triton is not installed.
        ValueError: the inputs are not on a CUDA device, or have another dtype; `top_k` is not allowed; the prototypes
            are to be trained.
    """
    check_triton(x_TI.device)
    if not 1 <= top_k <= MOST_CHOSEN:
        raise ValueError(f"top_k={top_k} is not allowed; arrow_top_k takes 1 to {MOST_CHOSEN}.")
    if prototypes_EI.dtype != torch.float32 or x_TI.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"arrow_top_k got inputs in {x_TI.dtype} and prototypes in {prototypes_EI.dtype}; allowed are float32, "
            "bfloat16 or float16, and float32."
        )
    if prototypes_EI.requires_grad:
        raise ValueError("prototypes_EI.requires_grad=True is not allowed; arrow_top_k gives prototypes no gradient.")
    temperature = max(temperature, torch.finfo(torch.float32).tiny)
    is_trained = torch.is_grad_enabled() and x_TI.requires_grad
    is_direct = not is_trained and not torch.compiler.is_compiling() and type(x_TI) in PLAIN
    choose = choose_experts if is_direct else CHOOSE
    index_TK, weights_TK, _ = choose(x_TI, prototypes_EI, min(top_k, prototypes_EI.shape[0]), temperature)
    return index_TK, weights_TK


def choose_experts(
    x_TI: torch.Tensor, prototypes_EI: torch.Tensor, num_chosen: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(index, weights, sign of x . v), each (T, K); arguments as of `arrow_top_k`, and checked there."""
    module = kernels("triton_routing_kernels")
    (tokens, features), experts = x_TI.shape, prototypes_EI.shape[0]
    x_TI, prototypes_EI = x_TI.contiguous(), prototypes_EI.contiguous()
    chosen = room_for_choice(x_TI, prototypes_EI, num_chosen, temperature)
    if tokens == 0:
        return chosen
    sizes, block_K, block_E = (tokens, experts, features), power_of_two(num_chosen), power_of_two(experts)
    is_few = tokens * experts <= FEW_SCORES
    is_one = is_few and experts <= FEW_EXPERTS
    dots_TE = x_TI.new_empty((1, 1) if is_one else (tokens, experts), dtype=torch.float32)
    if is_few:
        constants = {"NUM_CHOSEN": num_chosen, "CHOOSES": is_one, "BLOCK_K": block_K, "BLOCK_I": 128}
        block = block_E if is_one else min(block_E, 8)
        grid = (tokens, ceil_div(experts, block))
        launch(
            module._score_few,
            grid,
            dots_TE,
            x_TI,
            prototypes_EI,
            *chosen,
            *sizes,
            temperature,
            BLOCK_E=block,
            **constants,
        )
    else:
        blocks = {"BLOCK_T": 32, "BLOCK_E": min(max(block_E, 16), 64), "BLOCK_I": 32}
        precision = "ieee" if x_TI.dtype == torch.float32 else "tf32x3"
        grid = (ceil_div(tokens, 32), ceil_div(experts, blocks["BLOCK_E"]))
        launch(module._score_many, grid, dots_TE, x_TI, prototypes_EI, *sizes, PRECISION=precision, **blocks)
    if not is_one:
        block_T = max(1, min(8, 1024 // block_E))
        constants = {"NUM_CHOSEN": num_chosen, "BLOCK_T": block_T, "BLOCK_K": block_K, "BLOCK_E": block_E}
        launch(
            module._choose_many,
            (ceil_div(tokens, block_T),),
            dots_TE,
            *chosen,
            tokens,
            experts,
            temperature,
            **constants,
        )
    return chosen


def room_for_choice(
    x_TI: torch.Tensor, prototypes_EI: torch.Tensor, num_chosen: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `choose_experts` returns, without values."""
    size = (x_TI.shape[0], num_chosen)
    return tuple(x_TI.new_empty(size, dtype=dtype) for dtype in (torch.int64, torch.float32, torch.float32))


def spread_scores(
    scores_TK: torch.Tensor, prototypes_EI: torch.Tensor, index_TK: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """sum_k scores[t, k] v[index[t, k]], (T, I): prototypes are experts of rank 1."""
    y_TI = torch.empty(scores_TK.shape[0], prototypes_EI.shape[1], dtype=dtype, device=scores_TK.device)
    columns_M1 = index_TK.new_empty((prototypes_EI.shape[0] + 1, 1))
    z_1TK1 = scores_TK.contiguous().unsqueeze(0).unsqueeze(-1)
    if y_TI.numel():
        expand_few(y_TI, z_1TK1, None, None, prototypes_EI, 0, index_TK, columns_M1, None, False, False)
    return y_TI


def _keep(ctx, inputs, output) -> None:
    x_TI, prototypes_EI, _, ctx.temperature = inputs
    ctx.dtype = x_TI.dtype
    ctx.save_for_backward(prototypes_EI, *output)
    ctx.mark_non_differentiable(output[0], output[2])


def _backward(ctx, grad_index, grad_TK, grad_signs):
    prototypes_EI, index_TK, weights_TK, signs_TK = ctx.saved_tensors
    mean_T1 = (weights_TK * grad_TK).sum(-1, keepdim=True)
    scores_TK = weights_TK * (grad_TK - mean_T1) * signs_TK / ctx.temperature
    return SPREAD(scores_TK, prototypes_EI, index_TK, ctx.dtype), None, None, None


CHOOSE = torch.library.custom_op("peft_arrow::choose_experts", choose_experts, mutates_args=())
CHOOSE.register_fake(room_for_choice)
CHOOSE.register_autograd(_backward, setup_context=_keep)
SPREAD = torch.library.custom_op("peft_arrow::spread_scores", spread_scores, mutates_args=())
SPREAD.register_fake(
    lambda scores, prototypes, index, dtype: prototypes.new_empty((scores.shape[0], prototypes.shape[1]), dtype=dtype)
)
