"""Pico models: bases, tokenizers and adapters that are made in milliseconds and need no download."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


_SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
_CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def pico_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a character: ASCII, four special tokens, nothing learned."""
    characters = sorted(set(string.printable))
    vocabulary = {token: position for position, token in enumerate(_SPECIAL + characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def pico_base(seed: int = 0) -> LlamaForCausalLM:
    """Return a Llama of two layers and width 32 with weights from `seed`; the global random state is kept."""
    config = LlamaConfig(
        vocab_size=len(_SPECIAL) + len(set(string.printable)),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def pico_adapter(folder: Path | str, *, seed: int, base: torch.nn.Module | None = None, **lora_config) -> str:
    """Save a plain PEFT LoRA adapter with random A and B for `base` (by default a new one); return its folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **lora_config)
        get_peft_model(base if base is not None else pico_base(), config).save_pretrained(str(folder))
    return str(folder)
