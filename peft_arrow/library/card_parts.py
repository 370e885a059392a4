"""What both cards share: how the base model, the licences and small tables are told, and how a template is filled."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..cards import card_template
from .licenses import OTHER, UNKNOWN, license_key, normalise_license, strictest
from .links import HUB, hub_id, hub_link, last_part
from .markdown import code, inline
from .names import slug


NOT_STATED = "(not stated)"
BASE_PLACEHOLDER = "path/to/the/base/model"
CARD_PLACEHOLDER = "path/to/this/folder"
SHOWN = 20


def render(template: str, data: ModelCardData, values: Mapping[str, Any]) -> str:
    """The card's text. The values go in as they are: each is Markdown that was made safe before."""
    card = ModelCard.from_template(data, template_path=str(card_template(template)), **values)
    return str(card).rstrip("\n") + "\n"


def shared_values(
    base_model: str | None, repo_id: str | None, licenses: list[tuple[str, str | None]]
) -> dict[str, Any]:
    """The template values that both cards have.

    Args:
        base_model (`str`, *optional*): Hub id or folder; of a folder only its name is shown.
        repo_id (`str`, *optional*): where the card will be on the Hub.
        licenses (`list`): (expert's name, licence as stated), in order.

    Raises:
        ValueError: `repo_id` is not a Hub id.
    """
    if repo_id is not None and hub_id(repo_id) is None:
        raise ValueError(f"repo_id={repo_id!r} is not a Hub id; it must have the form 'user/repo'.")
    base_id = hub_id(base_model)
    base_name = last_part(base_model or "")
    named = [] if base_id else [code(BASE_PLACEHOLDER)]
    return {
        "title": inline(last_part(repo_id) if repo_id else f"Experts for {base_name or 'a base model'}"),
        "base": hub_link(base_id) if base_id else code(base_name) or "a base model that is not stated",
        "base_code": base_id or BASE_PLACEHOLDER,
        "repo_code": repo_id or CARD_PLACEHOLDER,
        "placeholders": " and ".join(named + ([] if repo_id else [code(CARD_PLACEHOLDER)])),
        "expert_count": len(licenses),
        "license_summary": _license_summary(strictest(text for _, text in licenses)),
        "licenses": _license_rows(licenses),
    }


def card_data(
    base_model: str | None, repo_id: str | None, licenses: Iterable[str | None], tags: Iterable[str], **more: Any
) -> ModelCardData:
    """The card's metadata; a base model that is no Hub id stays out of it."""
    base_id = hub_id(base_model)
    if base_id:
        tags = [*tags, f"base_model:adapter:{base_id}"]
        more = {"base_model": base_id, "base_model_relation": "adapter", **more}
    return ModelCardData(library_name="peft", tags=sorted(tags), **_license_data(list(licenses), repo_id), **more)


def license_label(text: str | None) -> str:
    """A stated licence for a table cell: the Hub's identifier, or `other` and what was stated."""
    name = normalise_license(text)
    if name is None:
        return NOT_STATED
    return f"other: {inline(text, 60)}" if name == OTHER and license_key(text) != OTHER else code(name)


def _license_rows(licenses: list[tuple[str, str | None]]) -> list[dict[str, str]]:
    holders: dict[str, list[str]] = {}
    for name, text in licenses:
        holders.setdefault(license_label(text), []).append(name)
    return [{"license": label, "experts": joined(names)} for label, names in holders.items()]


def _license_summary(name: str) -> str:
    if name == UNKNOWN:
        return "Not every expert states a licence, so the metadata gives `unknown` for the whole."
    if name == OTHER:
        return "No single licence of the Hub's list stands for all of these, so the metadata gives `other`."
    return f"`{name}` is the strictest licence that the experts state; the metadata gives it for the whole."


def _license_data(licenses: list[str | None], repo_id: str | None) -> dict[str, str]:
    name = strictest(licenses)
    if name != OTHER:
        return {"license": name}
    keys = {license_key(text) for text in licenses}
    named = re.sub("--+", "-", slug(keys.pop())[:60]) if len(keys) == 1 else "several"
    link = {"license_link": f"{HUB}/{repo_id}#licences"} if repo_id else {}
    return {"license": OTHER, "license_name": named, **link}


def joined(names: Iterable[str]) -> str:
    """Names as code with commas between, the first 20 of them."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(code(name) for name in names[:SHOWN]) + more


def setting_rows(settings: Mapping[str, Any]) -> list[dict[str, str]]:
    """Names and values for a table of two columns; nested values as JSON."""
    return [{"name": code(name, 60) or NOT_STATED, "value": _told(value)} for name, value in settings.items()]


def _told(value: Any) -> str:
    if value is None:
        return NOT_STATED
    if isinstance(value, (Mapping, list, tuple)):
        value = json.dumps(value, ensure_ascii=False, default=str)
    return code(str(value), 300) or NOT_STATED


def version_rows(versions: Mapping[str, str] | None) -> list[dict[str, str]]:
    """Names and versions for a list."""
    return [{"name": inline(name, 60), "value": inline(version, 60)} for name, version in (versions or {}).items()]
