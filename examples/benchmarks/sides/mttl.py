"""mttl's formulation of Arrow, from its formula, as a layer.

mttl composes parameters: for each token A* = sum_i w_i A_i and B* = sum_j w_j B_j, and the update is s x A* B*, with
cross terms (arXiv 2405.11157, section 4.1). Its selector scores in float32, |x . v_i|, takes the softmax over the kept
scores, and scatters the weights back to all experts; then one einsum over all experts makes A* (T, I, R) and one B*
(T, R, O).
"""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import nn

from .bases import sharing_copy
from .ours import ADAPTER, prototypes, routed_layers


class ComposedLinear(nn.Module):
    """A linear module with experts that are composed for each token.

    Args:
        base_layer (`nn.Linear`): the base's module.
        lora_A (`torch.Tensor`): (E, I, R).
        lora_B (`torch.Tensor`): (E, R, O).
        prototypes (`torch.Tensor`): float32 (E, I).
        scaling (`float`): s, one for all experts.
        top_k (`int`): experts a token.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        prototypes: torch.Tensor,
        scaling: float,
        top_k: int,
    ) -> None:
        super().__init__()
        self.base_layer, self.scaling, self.top_k = base_layer, scaling, min(top_k, len(lora_A))
        self.register_buffer("lora_A", lora_A)
        self.register_buffer("lora_B", lora_B)
        self.register_buffer("prototypes", prototypes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., I) -> (..., O)."""
        x_TI = x.reshape(-1, x.shape[-1])
        kept_TK, index_TK = (x_TI.float() @ self.prototypes.T).abs().topk(self.top_k, dim=-1)
        weights_TE = x_TI.new_zeros(len(x_TI), len(self.lora_A), dtype=torch.float32)
        weights_TE = weights_TE.scatter(1, index_TK, kept_TK.softmax(-1)).to(x.dtype)
        lora_A_TIR = torch.einsum("te,eir->tir", weights_TE, self.lora_A)
        lora_B_TRO = torch.einsum("te,ero->tro", weights_TE, self.lora_B)
        y_TO = torch.einsum("tr,tro->to", torch.einsum("ti,tir->tr", x_TI, lora_A_TIR), lora_B_TRO)
        return self.base_layer(x) + (self.scaling * y_TO).reshape(*x.shape[:-1], -1)


@torch.no_grad()
def composed_model(base: nn.Module, ours: PeftModel, top_k: int) -> nn.Module:
    """The base with a `ComposedLinear` in the place of each routed module, of the same experts and prototypes."""
    model = sharing_copy(base)
    for name, layer in routed_layers(ours).items():
        factors = layer.expert_factors(ADAPTER)
        composed = ComposedLinear(
            model.get_submodule(name),
            torch.stack([lora_A.T for lora_A, _ in factors]),
            torch.stack([lora_B.T for _, lora_B in factors]),
            prototypes(layer),
            layer.experts[ADAPTER].scalings[0],
            top_k,
        )
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, composed)
    return model.eval()


def forward_bytes(tokens: int, rank: int, base_linears: dict[str, nn.Linear]) -> int:
    """What its forward needs beside weights: A* and B* of all tokens for the widest module."""
    return max(tokens * rank * sum(linear.weight.shape) * linear.weight.itemsize for linear in base_linears.values())
