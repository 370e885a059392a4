"""What vLLM accepts of a LoRA folder, checked by rule.

Read in vLLM's sources: `vllm/lora/peft_helper.py` (https://docs.vllm.ai/en/latest/api/vllm/lora/peft_helper/),
`vllm/config/lora.py` at commit a78dc92f43ae and `vllm/lora/lora_model.py` at commit 0306474e9d1f. That helper reads
one `r` and one `lora_alpha` and does not look at the patterns; a later one does, and refuses more kinds by name. A
folder without notes is accepted by both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


# `MaxLoRARanks`: what `--max-lora-rank` may be; an adapter's rank may be anything up to that.
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
DEFAULT_MAX_LORA_RANK = 16
REQUIRED = ("r", "lora_alpha", "target_modules")
UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias on lora_B",
    "alora_invocation_tokens": "aLoRA",
    "layer_replication": "layer_replication",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QALoRA",
    "trainable_token_indices": "trained token embeddings",
}
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")


def served_rank(rank: int) -> int:
    """The smallest of `MAX_LORA_RANKS` that is at least `rank`; above the largest, `rank` itself."""
    return next((served for served in MAX_LORA_RANKS if served >= rank), rank)


def vllm_notes(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]] | None = None) -> list[str]:
    """Why vLLM would refuse a LoRA folder, or what it must be started with; empty where its defaults serve it.

    Args:
        config (`Mapping`): the content of `adapter_config.json`.
        shapes (`Mapping`, *optional*): shape by key of `adapter_model.safetensors`.
    """
    notes = []
    missing = [name for name in REQUIRED if config.get(name) is None]
    if missing:
        notes.append(f"vLLM needs {', '.join(missing)} in adapter_config.json, which lacks it.")
    if config.get("bias", "none") != "none":
        notes.append("vLLM refuses it: only bias='none' is served.")
    if config.get("modules_to_save"):
        notes.append("vLLM refuses it: modules_to_save is not served.")
    for option, name in UNSUPPORTED.items():
        if config.get(option):
            notes.append(f"vLLM refuses it or serves it wrongly: {name} is not supported.")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        notes.append(f"vLLM refuses it or serves it wrongly: init_lora_weights={init!r} belongs to a changed base.")
    return notes + _rank_notes(config, shapes or {})


def _rank_notes(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    notes = []
    found = {shape[0] for key, shape in shapes.items() if key.endswith(".lora_A.weight") and len(shape) == 2}
    r = config.get("r")
    ranks = sorted(found | ({r} if isinstance(r, int) and not isinstance(r, bool) else set()))
    if len(ranks) > 1 or config.get("rank_pattern") or config.get("alpha_pattern"):
        notes.append(
            "vLLM reads one rank and one alpha for all modules (before it learnt rank_pattern) and would scale this "
            "adapter wrongly; export it with one rank."
        )
    largest = ranks[-1] if ranks else 0
    if largest > MAX_LORA_RANKS[-1]:
        notes.append(f"vLLM refuses it: its rank is {largest}, and at most {MAX_LORA_RANKS[-1]} is served.")
    elif largest > DEFAULT_MAX_LORA_RANK:
        notes.append(f"vLLM serves it when started with --max-lora-rank {served_rank(largest)}.")
    return notes
