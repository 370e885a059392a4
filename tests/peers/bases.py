"""Tiny models of the architectures in part A of the peers study, made from configs, each with its inputs.

Weights are ten times larger than the libraries' default of 0.02, so that an adapter changes the output visibly.
"""

from __future__ import annotations

import torch
import transformers as hf


WIDTH = 32
COMMON = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**COMMON, "vocab_size": 64, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {**COMMON, "initializer_range": 0.2, "image_size": 32, "patch_size": 8}


def make(model_class, config) -> torch.nn.Module:
    """The model with weights from seed 0; the global random state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config).eval()


def llama(**options):
    return make(hf.LlamaForCausalLM, hf.LlamaConfig(**{**TEXT, "num_key_value_heads": 2, **options}))


def llama_classifier():
    return make(hf.LlamaForSequenceClassification, hf.LlamaConfig(**TEXT, num_labels=3))


def gpt2():
    options = {"vocab_size": 64, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2}
    return make(hf.GPT2LMHeadModel, hf.GPT2Config(n_embd=WIDTH, n_layer=2, n_head=4, **options))


def t5():
    sizes = {"d_model": WIDTH, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    return make(hf.T5ForConditionalGeneration, hf.T5Config(**sizes, decoder_start_token_id=0))


def opt():
    sizes = {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 64, "num_hidden_layers": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = hf.OPTConfig(**sizes, num_attention_heads=4, vocab_size=64, init_std=0.2, **special)
    return make(hf.OPTForCausalLM, config)


def mixtral():
    sizes = {"num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    return make(hf.MixtralForCausalLM, hf.MixtralConfig(**TEXT, **sizes))


def bert_classifier():
    return make(hf.BertForSequenceClassification, hf.BertConfig(**TEXT, num_labels=3))


def vit_classifier():
    return make(hf.ViTForImageClassification, hf.ViTConfig(**IMAGE, num_labels=3))


def swin_classifier():
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
    return make(
        hf.SwinForImageClassification, hf.SwinConfig(**sizes, window_size=4, initializer_range=0.2, num_labels=3)
    )


def segformer():
    sizes = {"depths": [1, 1], "hidden_sizes": [16, 32], "num_encoder_blocks": 2, "sr_ratios": [2, 1]}
    stages = {"num_attention_heads": [1, 2], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2]}
    config = hf.SegformerConfig(**sizes, **stages, decoder_hidden_size=32, initializer_range=0.2, num_labels=3)
    return make(hf.SegformerForSemanticSegmentation, config)


def whisper():
    sizes = {"d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8, "max_source_positions": 16}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = hf.WhisperConfig(**sizes, **heads, vocab_size=64, init_std=0.2, max_target_positions=16, **special)
    return make(hf.WhisperForConditionalGeneration, config)


def clip():
    text = {key: value for key, value in TEXT.items() if key != "initializer_range"}
    image = {key: value for key, value in IMAGE.items() if key != "initializer_range"}
    config = hf.CLIPConfig(text_config=text, vision_config=image, projection_dim=16, initializer_factor=5.0)
    return make(hf.CLIPModel, config)


def token_ids(rows: int = 2, length: int = 9, seed: int = 5) -> torch.Tensor:
    """Ids without special tokens, so that nothing counts as padding."""
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def pixels(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(6))


def inputs_of(make_base) -> dict[str, torch.Tensor]:
    """Inputs that the model of a factory above takes."""
    ids = token_ids()
    if make_base is t5:
        return {"input_ids": ids, "decoder_input_ids": ids}
    if make_base is whisper:
        features = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(7))
        return {"input_features": features, "decoder_input_ids": ids}
    if make_base is clip:
        return {"input_ids": ids, "pixel_values": pixels()}
    if make_base in (vit_classifier, swin_classifier, segformer):
        return {"pixel_values": pixels()}
    return {"input_ids": ids}
