"""What a result depends on, as short digests: the base, the library, the rows for fitting."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..library.library import AdapterLibrary


SAMPLED = 64


def digest_of(value: Any) -> str:
    """16 hexadecimal digits of the content of `value`, anything that JSON knows, whatever the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def library_fingerprint(library: AdapterLibrary) -> str:
    """Follows names, order, configs and weights of the experts; not where they lie."""
    digest = hashlib.sha256()
    for name, adapter in library.items():
        config = {
            key: value
            for key, value in adapter.config.items()
            if key not in ("base_model_name_or_path", "inference_mode")
        }
        digest.update(json.dumps([name, config], sort_keys=True, default=_plain).encode())
        for key, tensor in sorted(adapter.tensors.items()):
            digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


def base_fingerprint(model: torch.nn.Module) -> str:
    """Follows the shapes of all parameters and the first values of each; that is not every weight, but it is quick."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if type(parameter.data) is torch.Tensor and parameter.is_floating_point() and parameter.device.type != "meta":
            digest.update(_bytes(parameter.detach().reshape(-1)[:SAMPLED]))
    return digest.hexdigest()[:16]


def rows_fingerprint(data: Mapping[str, Iterable[Any]]) -> str:
    """Follows the rows of each expert and their order."""
    return digest_of({name: list(rows) if not isinstance(rows, str) else rows for name, rows in data.items()})


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(getattr(value, "value", value))
