"""CUDA: factors are read by index and never copied, routing weights are applied on the way, nothing waits for the GPU.

Few assignments of tokens to experts, without gradients (decoding), take two launches a bank: one shrinks, a program an
assignment, block of ranks and part of the features; one expands, a program a token and block of outputs, which also
sums the parts, applies the routing weights, sums over the experts and adds to `onto_TO`. Otherwise assignments are
sorted by expert on the device and cut into chunks of one expert, which are tiles of matmuls: `triton_sorted.py`.
Between shrink and expand an assignment is r numbers in float32; routing weights and `aggregation="parameter"` act on
them in torch, which gives their gradients, and the backward is made of the same kernels.

Ranks are padded by masks and only inside a program. float32 is multiplied as float32, without TF32. The kernels, and
triton with them, are imported when one first runs.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from .folded import folded
from .grouped import grouped
from .stack import PLAIN, ExpertStack, local_index
from .triton_launch import check_triton, ranks_differ, shrink_parts
from .triton_operators import FUNCTIONS, OPERATORS
from .triton_sorted import sort_assignments


# Up to so many assignments factors are read anew for each, and nothing is sorted. Not measured.
FEW_ASSIGNMENTS = 512


def triton(
    x_TI: torch.Tensor,
    stack: ExpertStack,
    index_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    aggregation: str,
    onto_TO: torch.Tensor | None = None,
) -> torch.Tensor:
    """Same result as `eager`; peak extra memory is (T, K, r) in float32 and some 128 MiB. Arguments as for `eager`.

    In training with experts that have dropout the kernel `grouped` runs in its place, and for an empty batch `folded`.

    Raises:
        ImportError: triton is not installed.
        ValueError: the inputs are not on a CUDA device.
    """
    check_triton(x_TI.device)
    call = (x_TI, stack, index_TK, weights_TK, aggregation, onto_TO)
    if index_TK.numel() == 0:
        return folded(*call)
    if stack.training and any(p for bank in stack.banks for p in bank.dropouts):
        return grouped(*call)
    tensors = [weight for bank in stack.banks for weight in (bank.lora_A.weight, bank.lora_B.weight)]
    is_trained = torch.is_grad_enabled() and any(t.requires_grad for t in (x_TI, weights_TK, *tensors))
    is_direct = not is_trained and not torch.compiler.is_compiling() and type(x_TI) in PLAIN
    ops = FUNCTIONS if is_direct else OPERATORS
    if index_TK.numel() <= FEW_ASSIGNMENTS and not is_trained:
        return _few(*call, ops)
    return _sorted(*call, ops, is_trained)


def _few(x_TI, stack, index_TK, weights_TK, aggregation, onto_TO, ops: SimpleNamespace) -> torch.Tensor:
    tables = [(bank.constants.columns_MR, bank.constants.local_E, ranks_differ(bank)) for bank in stack.banks]
    shrunk = []
    for bank, table in zip(stack.banks, tables, strict=True):
        parts = shrink_parts(index_TK.numel(), table[0].shape[1], x_TI.shape[1])
        shrunk.append(ops.shrink_few(x_TI, bank.lora_A.weight, index_TK, *table, parts))
    if aggregation == "parameter":
        mixed_TKr = _mixed([z_PTKr.sum(0) for z_PTKr in shrunk], weights_TK)
        shrunk = [mixed_TKr.unsqueeze(0) for _ in shrunk]
    is_onto = onto_TO is not None and onto_TO.stride(1) == 1
    y_TO = onto_TO if is_onto else x_TI.new_empty(x_TI.shape[0], stack.out_features)
    is_added = is_onto
    for bank, table, z_PTKr in zip(stack.banks, tables, shrunk, strict=True):
        scaling_MR = bank.constants.scaling_MR
        ops.expand_few(y_TO, z_PTKr, weights_TK, scaling_MR, bank.lora_B.weight, 1, index_TK, *table, is_added)
        is_added = True
    return y_TO if is_onto or onto_TO is None else onto_TO.add_(y_TO)


def _sorted(x_TI, stack, index_TK, weights_TK, aggregation, onto_TO, ops, is_trained: bool) -> torch.Tensor:
    by_expert = [sort_assignments(bank, index_TK, ops.cut_chunks) for bank in stack.banks]
    shrunk = [
        ops.shrink_sorted(x_TI, bank.lora_A.weight, 0, *one) for bank, one in zip(stack.banks, by_expert, strict=True)
    ]
    if aggregation == "parameter":
        mixed_TKr = _mixed(shrunk, weights_TK)
        shrunk = [mixed_TKr for _ in shrunk]
    is_onto = onto_TO is not None and onto_TO.stride(1) == 1 and not is_trained
    y_TO = onto_TO if is_onto else None
    for bank, one, z_TKr in zip(stack.banks, by_expert, shrunk, strict=True):
        scaling_TK = bank.constants.scaling_MR[local_index(bank, index_TK), 0]
        gated_TKr = z_TKr * (weights_TK * scaling_TK).unsqueeze(-1)
        if y_TO is None:
            y_TO = ops.expand_sorted(gated_TKr, bank.lora_B.weight, 1, *one)
        elif is_trained:
            y_TO = y_TO + ops.expand_sorted(gated_TKr, bank.lora_B.weight, 1, *one)
        else:
            ops.add_sorted(y_TO, gated_TKr, bank.lora_B.weight, 1, *one)
    return y_TO if is_onto or onto_TO is None else onto_TO.add_(y_TO)


def _mixed(shrunk_TKr: list[torch.Tensor], weights_TK: torch.Tensor) -> torch.Tensor:
    """sum_i w_i A_i x, the same for each slot of a token."""
    mixed_TKr = sum(z_TKr * weights_TK.unsqueeze(-1) for z_TKr in shrunk_TKr)
    return mixed_TKr.sum(1, keepdim=True).expand(mixed_TKr.shape).contiguous()
