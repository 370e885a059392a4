"""Compile every Triton kernel for a CUDA target, as launched, without a GPU: python -m tests.ops.compile_triton 90

Prints a line for each kernel: its name, bytes of shared memory, and its constants. Fails where shared memory is more
than a program of a small GPU of this generation has.
"""

from __future__ import annotations

import sys
from importlib import import_module

import torch
import triton
from triton.backends.compiler import GPUTarget

from peft_arrow.ops import triton_few, triton_routing, triton_sorted
from tests.ops.test_kernels import make_routing, make_stack


SHARED_MEMORY = 99 * 1024
KERNEL = import_module("peft_arrow.ops.triton")


class Driver:
    """What triton asks of a GPU before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def compile_only(kernel, grid, tensor, *arguments, **constants) -> None:
    compiled = kernel.warmup(tensor, *arguments, grid=grid, **constants)
    assert compiled.metadata.shared <= SHARED_MEMORY, (compiled.metadata.name, compiled.metadata.shared, constants)
    print(compiled.metadata.name, compiled.metadata.shared, constants)


def compile_layer(tokens, ranks, banks, features, dtype, num_chosen, is_trained) -> None:
    stack = make_stack(ranks, banks, features, features, dtype)
    if not is_trained:  # as the tuner lays out frozen factors
        for bank in stack.banks:
            bank.lora_B.weight.data = bank.lora_B.weight.data.t().contiguous().t()
    x = torch.randn(tokens, features).to(dtype).requires_grad_(is_trained)
    index, weights = make_routing(tokens, len(ranks), num_chosen)
    with torch.set_grad_enabled(is_trained):
        y = KERNEL.triton(x, stack, index, weights, "output", None if is_trained else torch.zeros_like(x))
    if is_trained:
        y.sum().backward()


def main(capability: int) -> None:
    triton.runtime.driver.set_active(Driver(capability))
    KERNEL.check_triton = triton_routing.check_triton = lambda device: None
    for module in (triton_few, triton_sorted, triton_routing):
        module.launch = compile_only
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        compile_layer(1, (16,) * 16, (tuple(range(16)),), 512, dtype, 4, False)
        compile_layer(1, (1,), ((0,),), 1, dtype, 1, False)  # sizes of 1 are constants to the compiler
        compile_layer(1, (1, 1), ((1,), (0,)), 1, dtype, 1, True)
        compile_layer(4, (4, 100, 16), ((1,), (0, 2)), 64, dtype, 2, False)
        for is_trained in (False, True):
            compile_layer(600, (16,) * 16, (tuple(range(16)),), 128, dtype, 4, is_trained)
            compile_layer(600, (4, 100, 16), ((1,), (0, 2)), 64, dtype, 2, is_trained)
            compile_layer(300, (64,) * 4, (tuple(range(4)),), 64, dtype, 3, is_trained)
            compile_layer(20, (8,) * 64, (tuple(range(64)),), 64, dtype, 32, is_trained)
        if dtype != torch.float64:
            for tokens, experts, top_k in ((1, 1, 1), (1, 16, 4), (1, 256, 4), (600, 16, 4), (600, 1000, 32)):
                for features in (1, 128):
                    x = torch.randn(tokens, features).to(dtype).requires_grad_()
                    triton_routing.arrow_top_k(x, torch.randn(experts, features), top_k, 1.0)[1].sum().backward()


if __name__ == "__main__":
    main(int(sys.argv[1]))
