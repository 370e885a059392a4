"""What a run is made in: the options, the base, and how fast the machine is."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .bases import base_and_tokenizer
from .inputs import token_ids
from .machine import peaks


@dataclass(frozen=True)
class Setting:
    """One run.

    Args:
        args (`argparse.Namespace`): the options, settled.
        base (`nn.Module`): the base.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): its tokenizer; random bases have none.
        peaks (`tuple[float, float]`): FLOPs and bytes a second of the machine.
    """

    args: argparse.Namespace
    base: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    peaks: tuple[float, float]

    def ids(self, routing: str, tokens: int, batch: int = 1) -> torch.Tensor:
        """int64 (batch, tokens) on the device: random, or of the text."""
        vocabulary = self.base.config.vocab_size
        return token_ids(routing, tokens, vocabulary, self.tokenizer, batch).to(self.args.device)


def setting_of(args: argparse.Namespace) -> Setting:
    """Load the base and measure the machine."""
    base, tokenizer = base_and_tokenizer(args.base, args.device, args.dtype)
    return Setting(args, base, tokenizer, peaks(args.device, args.dtype))
