"""The cards of a library and of a routed model: Markdown as a pure function of what they hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from .card_parts import card_data, license_label, render, setting_rows, shared_values, version_rows
from .card_rows import eval_result, evaluation_row, expert_row, metadata, named_datasets, source_link
from .links import dataset_id, hub_link, is_ref, last_part
from .manifest import PICTURES_FOLDER, Manifest
from .markdown import code, fenced, inline, paragraphs
from .names import check_name


# First line of every card that is written here. A card without it is somebody's own.
MARK = "<!-- Written by peft-arrow, which writes it anew unless this line is removed. -->"
# No colon: `license:...` and `base_model:...` are filters of the Hub, and only our own metadata may set them.
_TAG = re.compile(r"\w[\w.+ \-]{0,62}")


def library_card(manifest: Manifest, *, repo_id: str | None = None, versions: Mapping[str, str] | None = None) -> str:
    """The `README.md` of a library.

    Every text of the manifest is shown as it is and does nothing: it cannot become markup, a link or another metadata
    field. Of folders on the machine that wrote it only the last part is shown.

    Args:
        manifest (`Manifest`): what the library holds.
        repo_id (`str`, *optional*): where it will be on the Hub; without it the snippets say `path/to/this/folder`.
        versions (`Mapping[str, str]`, *optional*): of the packages that wrote it.

    Raises:
        ValueError: `repo_id` is not a Hub id, or an expert's name is not allowed.
    """
    experts, notes = manifest.experts, manifest.notes
    names = [check_name(record.name) for record in experts]
    licenses = [(record.name, record.origin.license) for record in experts]
    datasets = named_datasets(experts)
    values = shared_values(manifest.base_model, repo_id, licenses)
    revision = manifest.base_model_revision
    if revision:
        values["base"] += f" (revision {code(revision, 60)})"
    command = notes.made.get("command")
    values |= {
        "mark": MARK,
        "description": paragraphs(notes.description or ""),
        "first": names[0],
        "revision": revision if revision and is_ref(revision) else None,
        "experts": [expert_row(record) for record in experts],
        "datasets": [hub_link(name, kind="datasets/") for name in datasets],
        "evaluation": [evaluation_row(entry) for entry in notes.evaluation],
        "pictures": [
            {"caption": inline(entry.caption) or "picture", "path": f"{PICTURES_FOLDER}/{quote(entry.file, safe='')}"}
            for entry in notes.pictures
        ],
        "command": fenced(command, "bash") if isinstance(command, str) and command.strip() else "",
        "made": setting_rows({name: value for name, value in notes.made.items() if name != "command"}),
        "versions": version_rows(versions),
    }
    more: dict[str, Any] = {"datasets": [name for name in datasets if dataset_id(name)] or None}
    if notes.evaluation:
        more["model_name"] = metadata(last_part(repo_id or manifest.base_model)) or "library"
        more["eval_results"] = [eval_result(entry) for entry in notes.evaluation]
    tags = ["adapter-library", "lora", "peft-arrow", "transformers"]
    data = card_data(manifest.base_model, repo_id, [text for _, text in licenses], tags, **more)
    return render("library.md", data, values)


def routed_card(
    *,
    base_model: str | None,
    experts: Sequence[Mapping[str, Any]],
    routing: Mapping[str, Any],
    auto_class: str,
    repo_id: str | None = None,
    versions: Mapping[str, str] | None = None,
    description: str | None = None,
    tags: Iterable[str] = (),
) -> str:
    """The `README.md` of a routed model; its texts are treated as those of `library_card`.

    Args:
        base_model (`str`, *optional*): Hub id or folder of the base model.
        experts (`Sequence[Mapping]`): each with `name`, `rank` (such as `"4-16"`), `modules` (their number), and where
            they are known `source` and `license`.
        routing (`Mapping`): the router's settings, by name.
        auto_class (`str`): the class of transformers that loads the base, such as `"AutoModelForCausalLM"`.
        repo_id (`str`, *optional*): where it will be on the Hub; without it the snippet says `path/to/this/folder`.
        versions (`Mapping[str, str]`, *optional*): of the packages that wrote it.
        description (`str`, *optional*): plain text.
        tags (`Iterable[str]`): more tags, such as those of the base model; those that are no plain words are left out.

    Raises:
        ValueError: `repo_id` is not a Hub id, `auto_class` not a Python name, or an expert's name is not allowed.
    """
    if not (auto_class.isidentifier() and auto_class.isascii()):
        raise ValueError(f"auto_class={auto_class!r} is not allowed; pass a name such as 'AutoModelForCausalLM'.")
    licenses = [(check_name(expert["name"]), expert.get("license")) for expert in experts]
    values = shared_values(base_model, repo_id, licenses) | {
        "mark": MARK,
        "auto_class": auto_class,
        "experts": [
            {
                "name": code(expert["name"]),
                "rank": inline(str(expert["rank"])),
                "modules": inline(str(expert["modules"])),
                "license": license_label(expert.get("license")),
                "source": source_link(expert.get("source")),
            }
            for expert in experts
        ],
        "routing": setting_rows(routing),
        "description": paragraphs(description or ""),
        "versions": version_rows(versions),
    }
    tags = {"lora", "peft-arrow", "transformers"} | {tag for tag in tags if _TAG.fullmatch(tag)}
    data = card_data(base_model, repo_id, [text for _, text in licenses], tags)
    return render("routed_model.md", data, values)
