"""What a user says about paging, checked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch


@dataclass(frozen=True)
class Paging:
    """Where experts are to rest, and how many of a layer lie on its compute device.

    Args:
        place (`Path`, *optional*): the folder of the file; None is CPU memory.
        hot_experts (`int`): the slots of a layer.
        autocast (`bool`): PEFT's `autocast_adapter_dtype`, for experts that are paged from the start.
    """

    place: Path | None
    hot_experts: int
    autocast: bool = True


def check_paging(store: str | PathLike, hot_experts: int, argument: str = "store", autocast: bool = True) -> Paging:
    """The two arguments of `page_experts`, checked; nothing is made.

    Raises:
        ValueError: `store` is neither `"cpu"` nor a folder, or `hot_experts` is no whole number of at least 1.
    """
    if isinstance(hot_experts, bool) or not isinstance(hot_experts, int) or hot_experts < 1:
        raise ValueError(f"hot_experts={hot_experts!r} is not allowed; it is a whole number of at least 1.")
    if store == "cpu":
        return Paging(None, hot_experts, autocast)
    if not isinstance(store, (str, PathLike)) or not os.fspath(store) or _is_device(store):
        raise ValueError(f"{argument}={store!r} is not allowed; it is 'cpu' or a folder.")
    place = Path(store).expanduser()
    if place.exists() and not place.is_dir():
        raise ValueError(f"{argument}={str(store)!r} is a file; it is 'cpu' or a folder.")
    return Paging(place, hot_experts, autocast)


def _is_device(store: str | PathLike) -> bool:
    """Whether a text names a device of torch, and so hardly a folder."""
    try:
        torch.device(store)
    except (RuntimeError, TypeError):
        return False
    return True
