"""The base models, and copies of one that share its weights."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase

from peft_arrow.quickstart.base import load_base


PICO, RANDOM_7B = "pico", "random-7b"
# Shapes with random weights: a Llama of two layers, and one of the size of Llama-2-7B.
SHAPES = {
    PICO: {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    RANDOM_7B: {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 32768,
    },
}


def base_and_tokenizer(
    base: str | None, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    """The base in eval mode; SmolLM2-135M where `base` is None. One with random weights has no tokenizer."""
    if base not in SHAPES:
        model, tokenizer = load_base(base, dtype)
        return model.to(device), tokenizer
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[base]), dtype=dtype).eval(), None


def sharing_copy(base: nn.Module) -> nn.Module:
    """A copy that can get layers of its own, with the same tensors as weights."""
    tensors = itertools.chain(base.parameters(), base.buffers())
    return copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})


def linear_modules(base: nn.Module) -> dict[str, nn.Linear]:
    """All linear modules but the head, which are what adapters are for."""
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    return {
        name: module for name, module in base.named_modules() if isinstance(module, nn.Linear) and module is not head
    }
