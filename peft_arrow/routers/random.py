"""Random: a control that chooses experts by chance, the same ones for the same input and seed."""

from __future__ import annotations

import zlib

import torch

from .base import LayerInput, Option, Router


MULTIPLIER = 0x2545F4914F6CDD1D
BITS = 23  # as many as float32 tells apart between 0 and 1


class RandomRouter(Router):
    """A standard normal number for each token, expert and module, computed from the bits of the input and the seed.

    No random state is read or changed: two equal calls route alike, also under gradient checkpointing, and tokens with
    other inputs get other experts. Not more than a control; it is in no paper of its own.
    """

    name = "random"
    summary = "a normal random number a token, expert and module"
    options = {"seed": Option(0, 0, "of the random numbers")}

    def score(self, layer: LayerInput) -> torch.Tensor:
        """Router logits, float32 (T, E)."""
        x_TI = layer.x_TI.detach().float().contiguous()
        bits_TI = x_TI.view(torch.int32).long()
        places_I = torch.arange(1, x_TI.shape[1] + 1, device=x_TI.device)
        hash_T1 = (_mix(bits_TI + places_I * MULTIPLIER)).sum(-1, keepdim=True)
        experts_E = torch.arange(1, layer.num_experts + 1, device=x_TI.device)
        salt = zlib.crc32(f"{layer.module}:{self.chosen['seed']}".encode())
        mixed_TE = _mix(_mix(hash_T1 + salt * MULTIPLIER % 2**63) + experts_E * MULTIPLIER)
        uniform_TE = ((mixed_TE >> (64 - BITS)) & (2**BITS - 1)).float().add(0.5) / 2**BITS
        return torch.special.ndtri(uniform_TE)


def _mix(values: torch.Tensor) -> torch.Tensor:
    """A bijection of 64-bit numbers that spreads every bit over all (xor-shift and multiply, wrapping round)."""
    for shift in (30, 27, 31):
        values = (values ^ ((values >> shift) & (2 ** (64 - shift) - 1))) * MULTIPLIER
    return values
