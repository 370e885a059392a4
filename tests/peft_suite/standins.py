"""Tiny models under the Hub ids that the upstream tests use: same architecture, seeded random weights.

The tests run in a folder that holds `<organisation>/<name>/` for each id. `from_pretrained` prefers an existing local
folder to the Hub, so no test is changed and the Hub is never asked.

Widths are at least 28 (narrower layers cannot take the ranks of the tests) and weights are drawn with a standard
deviation of 0.1 (with 0.02 a tiny model's output hardly depends on its adapter, and "the adapter changes the output"
is asserted often).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers


VOCABULARY = 128
# The tests' inputs are the ids 0 to 2. Padding is none of them: its embedding is zero, and so would be every delta.
TOKENS = {"bos_token_id": 4, "eos_token_id": 5, "pad_token_id": 3}
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    **TOKENS,
}
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 3,
}


def _opt(layers: int = 2, width: int = 32) -> transformers.PreTrainedModel:
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        init_std=0.1,
        **TOKENS,
    )
    return transformers.OPTForCausalLM(config)


def _gpt2() -> transformers.PreTrainedModel:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.1, **TOKENS
    )
    return transformers.GPT2LMHeadModel(config)


def _gptj() -> transformers.PreTrainedModel:
    config = transformers.GPTJConfig(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        rotary_dim=4,
        initializer_range=0.1,
        tie_word_embeddings=False,
        **TOKENS,
    )
    return transformers.GPTJForCausalLM(config)


def _gemma3() -> transformers.PreTrainedModel:
    config = transformers.Gemma3TextConfig(**{**LLAMA, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16})
    return transformers.Gemma3ForCausalLM(config)


def _llama_classifier() -> transformers.PreTrainedModel:
    # Upstream's stand-in has one label and no padding token, and a test has a branch for it.
    config = transformers.LlamaConfig(**{**LLAMA, "pad_token_id": None, "num_labels": 1})
    return transformers.LlamaForSequenceClassification(config)


def _t5() -> transformers.PreTrainedModel:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        initializer_factor=1.0,
    )
    return transformers.T5ForConditionalGeneration(config)


def _bart() -> transformers.PreTrainedModel:
    side = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}
    sides = {f"{name}_{key}": value for name in ("encoder", "decoder") for key, value in side.items()}
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        max_position_embeddings=128,
        init_std=0.1,
        decoder_start_token_id=5,
        forced_eos_token_id=None,
        **sides,
        **TOKENS,
    )
    return transformers.BartForConditionalGeneration(config)


def _deberta_v2() -> transformers.PreTrainedModel:
    return transformers.DebertaV2Model(transformers.DebertaV2Config(**BERT, relative_attention=False))


BUILDERS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": _opt,
    "peft-internal-testing/opt-125m": lambda: _opt(layers=12, width=64),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": _gpt2,
    "hf-internal-testing/tiny-random-gpt2": _gpt2,
    "peft-internal-testing/tiny-random-GPTJForCausalLM": _gptj,
    "trl-internal-testing/tiny-random-LlamaForCausalLM": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**LLAMA)
    ),
    "peft-internal-testing/tiny-dummy-qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**{**LLAMA, "num_key_value_heads": 2})
    ),
    "hf-internal-testing/tiny-random-MistralForCausalLM": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**LLAMA)
    ),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": _gemma3,
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": _t5,
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": _bart,
    "peft-internal-testing/tiny-random-BertForSequenceClassification": lambda: (
        transformers.BertForSequenceClassification(transformers.BertConfig(**BERT))
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": lambda: (
        transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**BERT))
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": _llama_classifier,
    "peft-internal-testing/tiny-random-BertModel": lambda: transformers.BertModel(transformers.BertConfig(**BERT)),
    "peft-internal-testing/tiny-random-RobertaModel": lambda: transformers.RobertaModel(
        transformers.RobertaConfig(**BERT)
    ),
    "peft-internal-testing/tiny-random-DebertaModel": lambda: transformers.DebertaModel(
        transformers.DebertaConfig(**BERT)
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": _deberta_v2,
}
ADAPTER = "peft-internal-testing/tiny-opt-lora-revision"
# Loaded only where gptqmodel is installed, which needs a GPU.
WITHOUT_STANDIN = "marcsun13/opt-350m-gptq-4bit"
KNOWN_IDS = frozenset(BUILDERS) | {ADAPTER, WITHOUT_STANDIN}


def build(folder: Path, ids: set[str]) -> None:
    """Write the stand-ins for `ids` below `folder`, each with the same seed on every machine."""
    transformers.utils.logging.disable_progress_bar()
    for model_id in sorted(ids & BUILDERS.keys()):
        torch.manual_seed(0)
        BUILDERS[model_id]().eval().save_pretrained(folder / model_id)
    if ADAPTER in ids:
        adapter = folder / ADAPTER
        adapter.mkdir(parents=True)
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "target_modules": ["q_proj", "v_proj"]}
        config["base_model_name_or_path"] = "peft-internal-testing/tiny-random-OPTForCausalLM"
        (adapter / "adapter_config.json").write_text(json.dumps(config))
