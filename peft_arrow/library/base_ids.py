"""The names of base models: copies, mirrors and folders of strangers' machines seen through. A hint, no proof."""

from __future__ import annotations

import re


# Organisations that publish other people's models under the same last name, mostly quantised.
MIRRORS = (
    *("unsloth", "thebloke", "nousresearch", "bartowski", "mlx-community", "lmstudio-community", "quantfactory"),
    *("redhatai", "neuralmagic", "hugging-quants", "casperhansen", "modelcloud", "ggml-org", "second-state"),
)
_SUFFIX = re.compile(
    r"[-_.](unsloth|bnb|[348]-?bits?|gguf|awq|gptq|exl2|mlx|hqq|aqlm|eetq|int[48]|fp(8|16)|bf16|hf|dynamic|quantized"
    r"|w\d+a\d+|\d+g)$"
)
_CACHE_FOLDER = re.compile(r"(?:^|/)models--([^/]+)(?:/|$)")


def is_local_path(name: str) -> bool:
    """Whether a base model's name is a path and not a Hub id; no file is looked at."""
    text = _without_address(name)
    inner = text.rstrip("/").count("/")
    return bool(text.startswith(("/", ".", "~")) or "\\" in text or re.match(r"[A-Za-z]:", text) or inner > 1)


def normalise_base(name: str | None) -> str | None:
    """The Hub id a base model's name stands for; of a path that tells none the last part; None for no name.

    `/cache/models--meta-llama--Llama-2-7b-hf/snapshots/<commit>` is `meta-llama/Llama-2-7b-hf`.
    """
    if not isinstance(name, str):
        return None
    text = _without_address(name).replace("\\", "/").rstrip("/")
    if cached := _CACHE_FOLDER.search(text):
        return cached[1].replace("--", "/", 1)
    if is_local_path(name):
        text = text.split("/")[-1]
    return text if text.strip(".~") else None


def is_same_base(one: str | None, other: str | None) -> bool:
    """Whether two names can mean the same base model: upper case, mirrors and quantised copies do not count.

    A path, or a legacy id without organisation such as `gpt2`, is compared by its last part.
    """
    names = [normalise_base(name) for name in (one, other)]
    if None in names:
        return False
    parts = [name.casefold().rpartition("/") for name in names]
    if _core(parts[0][2]) != _core(parts[1][2]):
        return False
    owners = {owner for owner, _, _ in parts}
    return len(owners) == 1 or any(not owner or owner in MIRRORS for owner in owners)


def _without_address(name: str) -> str:
    return re.sub(r"^https?://(www\.)?(huggingface\.co|hf\.co)/", "", name.strip())


def _core(last_part: str) -> str:
    """The last part of an id without marks of format and quantisation; Meta's Llama 3 has two spellings."""
    while (shorter := _SUFFIX.sub("", last_part)) != last_part:
        last_part = shorter
    return last_part.removeprefix("meta-")
