"""The operators of the kernel `triton` as torch operators, and as the functions they are made of.

As operators they have gradients, and torch.compile keeps them as they are. The functions are for where neither is
needed: the dispatch of an operator in Python took 23 us on a CPU, more than a launch.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from .triton_few import expand_few, room_for_parts, shrink_few
from .triton_launch import sum_dtype
from .triton_sorted import add_sorted, cut_chunks, expand_sorted, outer_sorted, room_for_chunks, shrink_sorted


FUNCTIONS = SimpleNamespace(
    shrink_few=shrink_few,
    expand_few=expand_few,
    cut_chunks=cut_chunks,
    shrink_sorted=shrink_sorted,
    expand_sorted=expand_sorted,
    add_sorted=add_sorted,
    outer_sorted=outer_sorted,
)
MUTATED = {"expand_few": ("y_TN",), "add_sorted": ("y_TN",)}
OPERATORS = SimpleNamespace(
    **{
        name: torch.library.custom_op(f"peft_arrow::{name}", function, mutates_args=MUTATED.get(name, ()))
        for name, function in vars(FUNCTIONS).items()
    }
)


def _shrunk(x_TN, factor, rank_dim, tables, is_ragged, rows):
    return x_TN.new_empty((*tables[0].shape, tables[4].shape[1]), dtype=sum_dtype(x_TN.dtype))


def _expanded(z_TKW, factor, rank_dim, tables, is_ragged, rows):
    return factor.new_empty((z_TKW.shape[0], factor.shape[1 - rank_dim]))


def _keep(ctx, inputs, output) -> None:
    rows, factor, ctx.rank_dim, tables, *ctx.sizes = inputs
    ctx.save_for_backward(rows, factor, *tables)


def _shrink_backward(ctx, grad_TKW):
    x_TN, factor, *tables = ctx.saved_tensors
    rest = (factor, ctx.rank_dim, tables, *ctx.sizes)
    grad_x = OPERATORS.expand_sorted(grad_TKW, *rest).to(x_TN.dtype) if ctx.needs_input_grad[0] else None
    grad_factor = OPERATORS.outer_sorted(x_TN, grad_TKW, *rest) if ctx.needs_input_grad[1] else None
    return grad_x, grad_factor, None, [None] * len(tables), None, None


def _expand_backward(ctx, grad_TN):
    z_TKW, factor, *tables = ctx.saved_tensors
    rest = (factor, ctx.rank_dim, tables, *ctx.sizes)
    grad_z = OPERATORS.shrink_sorted(grad_TN, *rest) if ctx.needs_input_grad[0] else None
    grad_factor = OPERATORS.outer_sorted(grad_TN, z_TKW, *rest) if ctx.needs_input_grad[1] else None
    return grad_z, grad_factor, None, [None] * len(tables), None, None


OPERATORS.shrink_few.register_fake(room_for_parts)
OPERATORS.expand_few.register_fake(lambda *arguments: None)
OPERATORS.cut_chunks.register_fake(room_for_chunks)
OPERATORS.shrink_sorted.register_fake(_shrunk)
OPERATORS.expand_sorted.register_fake(_expanded)
OPERATORS.add_sorted.register_fake(lambda *arguments: None)
OPERATORS.outer_sorted.register_fake(lambda x_TN, z_TKW, factor, *rest: torch.empty_like(factor))
OPERATORS.shrink_sorted.register_autograd(_shrink_backward, setup_context=_keep)
OPERATORS.expand_sorted.register_autograd(_expand_backward, setup_context=_keep)
