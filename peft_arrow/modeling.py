"""The one place where library and tuner meet: routed models on the Hub, and their cards."""

from __future__ import annotations

import copy
import functools
import shutil
import tempfile
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import CommitInfo
from peft import PeftConfig, PeftModel

from .library.card import MARK, routed_card
from .library.files import CARD_NAME, read_origin
from .library.hub import check_public_base, push_folder
from .library.library import AdapterLibrary
from .library.links import hub_id
from .library.manifest import MANIFEST_NAME
from .library.reading import CONFIG_NAME, hub_place
from .library.versions import framework_versions
from .tuner import ArrowLoraConfig
from .tuner.layouts import layout_table
from .tuner.loading import AUTO_CLASSES


ROUTED_FILES = ("adapter_config.json", "adapter_model.safetensors")
# Arguments of transformers' `push_to_hub` that say how several weight files are written; a routed model has one.
WITHOUT_MEANING = ("max_shard_size", "safe_serialization", "use_temp_dir")


def push_to_hub(
    model: PeftModel,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    tags: Sequence[str] | None = None,
) -> CommitInfo:
    """Save a routed model and upload it as one commit, with our card; `model.push_to_hub` does the same.

    transformers' own `push_to_hub` replaces the card of a PEFT model by one without base model and tags.

    Args:
        model (`PeftModel`): a routed model.
        repo_id (`str`): `user/repo`, or `repo` for your own; made if it does not exist.
        private (`bool`, *optional*): whether a new repository is private.
        token (`str` or `bool`, *optional*): a token that may write.
        revision (`str`, *optional*): a branch, made if it does not exist.
        commit_message, commit_description (`str`, *optional*): of the commit.
        create_pr (`bool`): open a pull request instead of writing to the branch.
        tags (`Sequence[str]`, *optional*): more tags for the card.

    Returns:
        `CommitInfo`: `.commit_url`, `.oid`, and `.pr_url` for a pull request.

    Raises:
        ValueError: the model is not a routed one, or the repository is a model of another kind.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
    """
    if not _is_routed(model):
        raise ValueError(
            f"model is a {type(model).__name__} without an active ARROW_LORA adapter; only routed models are pushed."
        )
    options = {"private": private, "token": token, "revision": revision, "create_pr": create_pr}
    options.update(commit_message=commit_message, commit_description=commit_description)
    with tempfile.TemporaryDirectory(prefix="peft-arrow-") as folder:
        model.save_pretrained(folder)
        all_tags = [*_base_tags(model), *(tags or ())]
        return _push(Path(folder), repo_id, model.active_peft_config, all_tags, options)


def push_saved(folder: str | PathLike, repo_id: str, *, base_model: str | None = None, **options: Any) -> CommitInfo:
    """Upload what `save_pretrained` of a library or of a routed model wrote.

    Args:
        folder (`str` or `PathLike`): the saved folder; it is not changed.
        repo_id (`str`): as in `push_to_hub`.
        base_model (`str`, *optional*): Hub id of the base model, where what was saved names a folder.
        options: as in `push_to_hub`.

    Raises:
        ValueError: the folder holds neither.
    """
    folder = Path(folder).expanduser()
    if (folder / MANIFEST_NAME).is_file():
        return AdapterLibrary.from_pretrained(folder, base_model).push_to_hub(repo_id, **options)
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"folder {str(folder)!r} holds no {MANIFEST_NAME} and no {CONFIG_NAME}; save a model first.")
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, ArrowLoraConfig):
        raise ValueError(
            f"folder {str(folder)!r} holds a plain adapter, not a routed model; pull it into a library first."
        )
    config.base_model_name_or_path = base_model or config.base_model_name_or_path
    with tempfile.TemporaryDirectory(prefix="peft-arrow-") as copy:
        for name in ROUTED_FILES:
            shutil.copyfile(folder / name, Path(copy, name))
        config.save_pretrained(copy)
        return _push(Path(copy), repo_id, config, (), options)


def _push(folder: Path, repo_id: str, config: ArrowLoraConfig, tags: Sequence[str], options: dict) -> CommitInfo:
    remedy = "set model.active_peft_config.base_model_name_or_path to the Hub id of the base."
    check_public_base(config.base_model_name_or_path, remedy)
    config = copy.copy(config)
    config.expert_licenses = _licenses(config, options.get("token"))
    message = f"Upload a routed model of {len(config.expert_names)} LoRA experts"
    return push_folder(
        folder,
        repo_id,
        card=lambda full_id: card_of(config, full_id, tags),
        files=ROUTED_FILES,
        **{**options, "commit_message": options.get("commit_message") or message},
    )


def _licenses(config: ArrowLoraConfig, token: str | bool | None) -> list[str | None]:
    """The experts' licences; where none is known of an adapter of the Hub, its card is read now."""
    found = []
    for source, license in zip(config.expert_sources, config.expert_licenses, strict=True):
        if license is None and hub_id("/".join((source or "").partition("@")[0].split("/")[:2])):
            license = read_origin(hub_place(source, None, {"token": token})).license
        found.append(license)
    return found


def card_of(config: ArrowLoraConfig, repo_id: str | None = None, tags: Sequence[str] = ()) -> str:
    """The card of a routed model.

    Args:
        config (`ArrowLoraConfig`): of the model.
        repo_id (`str`, *optional*): where it will lie, for the snippet; by default the snippet names a folder.
        tags (`Sequence[str]`): more tags.
    """
    rows = zip(
        config.expert_names,
        [_shape_of(config.layouts[layout]) for layout in config.expert_layouts],
        config.expert_sources,
        config.expert_licenses,
        strict=True,
    )
    routing = ("router", "top_k", "router_temperature", "aggregation")
    return routed_card(
        base_model=config.base_model_name_or_path,
        experts=[{"name": name, **shape, "source": source, "license": terms} for name, shape, source, terms in rows],
        routing={name: getattr(config, name) for name in routing},
        auto_class=AUTO_CLASSES.get(config.task_type, transformers.AutoModel).__name__,
        repo_id=repo_id,
        versions=framework_versions(),
        tags=tags,
    )


def _shape_of(layout: dict[str, Any]) -> dict[str, Any]:
    """Rank and number of modules of an expert with this layout, as a card shows them."""
    table = layout_table(layout)
    ranks = sorted({rank for rank, _ in table.values()} if table else {layout["rank"]})
    rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
    return {"rank": rank, "modules": len(table) if table else "all targeted"}


def _is_routed(model: Any) -> bool:
    return isinstance(model, PeftModel) and isinstance(model.peft_config.get(model.active_adapter), ArrowLoraConfig)


def _base_tags(model: PeftModel) -> list[str]:
    return list(getattr(model.get_base_model(), "model_tags", None) or ())


def bind_to_peft_model() -> None:
    """Give routed models our card on saving and our `push_to_hub`; other PEFT methods are passed on untouched.

    A card that a person wrote or took over, which is one without our first line, keeps its text.
    """
    update_card, push = PeftModel.create_or_update_model_card, PeftModel.push_to_hub
    if hasattr(push, "_peft_arrow"):
        return

    @functools.wraps(update_card)
    def create_or_update_model_card(self, output_dir, *args, **kwargs):
        if not _is_routed(self):
            return update_card(self, output_dir, *args, **kwargs)
        path = Path(output_dir, CARD_NAME)
        if path.exists() and MARK not in path.read_text(encoding="utf-8"):
            return update_card(self, output_dir, *args, **kwargs)
        path.write_text(card_of(self.active_peft_config, tags=_base_tags(self)), encoding="utf-8")

    @functools.wraps(push)
    def push_routed_to_hub(self, repo_id, *args, **kwargs):
        if not _is_routed(self):
            return push(self, repo_id, *args, **kwargs)
        kept = {name: value for name, value in kwargs.items() if name not in WITHOUT_MEANING}
        return push_to_hub(self, repo_id, *args, **kept)

    push_routed_to_hub._peft_arrow = True
    PeftModel.create_or_update_model_card = create_or_update_model_card
    PeftModel.push_to_hub = push_routed_to_hub
