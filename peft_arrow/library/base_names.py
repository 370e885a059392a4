"""Which base model adapters are of, by the names in their configs: a hint, which shapes confirm or refute later."""

from __future__ import annotations

from collections.abc import Iterable

from .adapter import Adapter
from .base_ids import is_local_path, is_same_base


def common_base(adapters: Iterable[Adapter]) -> str:
    """The base model that all adapters name; a Hub id rather than a folder.

    Raises:
        ValueError: none names one, or two name different ones.
    """
    named = [adapter for adapter in adapters if adapter.base_model_name_or_path]
    if not named:
        raise ValueError("no adapter names its base model; pass base_model=<Hub id or folder>.")
    check_base(named[0].base_model_name_or_path, named, f"adapter {named[0].name!r}")
    names = [adapter.base_model_name_or_path for adapter in named]
    return next((name for name in names if not is_local_path(name)), names[0])


def check_base(base_model: str, adapters: Iterable[Adapter], owner: str) -> None:
    """Raise a `ValueError` where an adapter names another base model than `owner` does; naming none is no error."""
    for adapter in adapters:
        name = adapter.base_model_name_or_path
        if name and not is_same_base(name, base_model):
            raise ValueError(
                f"adapter {adapter.name!r} ({adapter.source}) is for the base model {name!r}, {owner} for "
                f"{base_model!r}; a library has one base model. Where both are the same model under two names, pass "
                "base_model=<its Hub id>."
            )


def base_revision(adapters: Iterable[Adapter]) -> str | None:
    """The revision of the base model, where all configs that name one agree."""
    stated = [adapter.config.get("revision") for adapter in adapters]
    found = {revision for revision in stated if isinstance(revision, str)}
    return found.pop() if len(found) == 1 else None
