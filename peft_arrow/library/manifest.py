"""`library.json`: what a library holds, where it is from and under which terms. Read from strangers, so checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .fields import Fields, parse_json
from .names import check_name


MANIFEST_NAME = "library.json"
FORMAT_VERSION = 1
EXPERTS_FOLDER = "experts"
PICTURES_FOLDER = "pictures"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PICTURE = re.compile(r"[\w\-][\w.\-]{0,95}\.(png|svg|jpg)")
PICTURE_RULE = "letters, digits, '_', '-' and '.', not first a dot, and an end of .png, .svg or .jpg"


@dataclass(frozen=True)
class Origin:
    """Where an adapter came from, and under which terms.

    Args:
        source (`str`, *optional*): a Hub reference without revision, or the name alone of a local folder.
        commit (`str`, *optional*): the commit on the Hub that the files were taken from, 40 hexadecimal digits.
        license (`str`, *optional*): a licence identifier of the Hub, such as `apache-2.0`; None where none is stated.
        task (`str`, *optional*): what it was trained for, in a few words.
        datasets (`tuple[str, ...]`): ids of the datasets it was trained on.
    """

    source: str | None = None
    commit: str | None = None
    license: str | None = None
    task: str | None = None
    datasets: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExpertRecord:
    """One expert's entry.

    Args:
        name (`str`): the expert's name; its files lie in `experts/<name>/`.
        rank (`int`): the largest rank of a module.
        alpha (`float`): `lora_alpha` of its config.
        target_modules (`tuple[str, ...]`): last parts of the names of the modules it has weights for, sorted.
        size (`int`): bytes of the weights' file.
        sha256 (`str`): of the weights' file, 64 hexadecimal digits.
        origin (`Origin`): where it came from.
    """

    name: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    size: int
    sha256: str
    origin: Origin = Origin()


@dataclass(frozen=True)
class Evaluation:
    """One measured figure: `metric` of the whole library on `dataset`.

    Args:
        dataset (`str`): its name for people.
        metric (`str`): such as `exact_match`.
        value (`float`): the result.
        dataset_id (`str`, *optional*): its Hub id.
        split (`str`, *optional*): such as `test`.
        method (`str`, *optional*): how the experts were used, such as `arrow`.
    """

    dataset: str
    metric: str
    value: float
    dataset_id: str | None = None
    split: str | None = None
    method: str | None = None


@dataclass(frozen=True)
class Picture:
    """A picture of the library: `pictures/<file>` and what it shows."""

    file: str
    caption: str


@dataclass(frozen=True)
class Notes:
    """What the people who made a library tell about it; all of it optional.

    Args:
        description (`str`, *optional*): plain text.
        made (`Mapping[str, Any]`): how it was made: `command`, `versions`, `seeds` and what else helps to repeat it.
        evaluation (`tuple[Evaluation, ...]`): measured figures.
        pictures (`tuple[Picture, ...]`): files in `pictures/`.
    """

    description: str | None = None
    made: Mapping[str, Any] = field(default_factory=dict)
    evaluation: tuple[Evaluation, ...] = ()
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """The content of `library.json`.

    Args:
        base_model (`str`): Hub id or folder of the base model.
        experts (`tuple[ExpertRecord, ...]`): in routing order.
        base_model_revision (`str`, *optional*): of the base model, where the adapters name one.
        notes (`Notes`): what its makers tell.
    """

    base_model: str
    experts: tuple[ExpertRecord, ...]
    base_model_revision: str | None = None
    notes: Notes = Notes()

    def to_json(self) -> str:
        """The text of `library.json`; the same for equal content."""
        content = {
            "format_version": FORMAT_VERSION,
            "base_model": {"name_or_path": self.base_model, "revision": self.base_model_revision},
            "experts": [{**_flat(record), "origin": _flat(record.origin)} for record in self.experts],
            "description": self.notes.description,
            "made": dict(self.notes.made),
            "evaluation": [asdict(entry) for entry in self.notes.evaluation],
            "pictures": [asdict(picture) for picture in self.notes.pictures],
        }
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Read `library.json`, checking every field.

        Args:
            text (`str`): the file's content.
            where (`str`): the library's reference, for messages.

        Raises:
            ValueError: not JSON, of another format version, or a field that is missing or of a wrong kind.
        """
        check = Fields(parse_json(text, f"library {where!r}: {MANIFEST_NAME}"), f"library {where!r}: {MANIFEST_NAME}")
        version = check.take("format_version", int)
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{check.where}: format_version is {version}; this version of peft-arrow reads {FORMAT_VERSION}."
            )
        base = check.inner("base_model")
        experts = tuple(_expert(entry) for entry in check.entries("experts"))
        names = [record.name for record in experts]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"{check.where}: experts are {names[:5]}; at least one is needed, and each name once.")
        notes = Notes(
            description=check.take("description", str, optional=True),
            made=_made(check),
            evaluation=tuple(_evaluation(entry) for entry in check.entries("evaluation", optional=True)),
            pictures=tuple(_picture(entry) for entry in check.entries("pictures", optional=True)),
        )
        revision = base.take("revision", str, optional=True)
        return cls(base.take("name_or_path", str), experts, revision, notes)


def check_picture_name(name: str) -> str:
    """Return a picture's file name that keeps the rule; raise a `ValueError` that states the rule otherwise."""
    if not _PICTURE.fullmatch(name):
        raise ValueError(f"picture {name!r} is not allowed; its file name must be {PICTURE_RULE}.")
    return name


def _flat(record: Any) -> dict[str, Any]:
    values = {name: getattr(record, name) for name in record.__dataclass_fields__ if name != "origin"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _expert(entry: Fields) -> ExpertRecord:
    try:
        name = check_name(entry.take("name", str))
    except ValueError as error:
        raise ValueError(f"{entry.where}: {error}") from error
    return ExpertRecord(
        name=name,
        rank=entry.at_least("rank", 1),
        alpha=entry.take("alpha", float),
        target_modules=entry.texts("target_modules"),
        size=entry.at_least("size", 0),
        sha256=entry.matching("sha256", _SHA256, "64 hexadecimal digits"),
        origin=_origin(entry.inner("origin")),
    )


def _origin(entry: Fields) -> Origin:
    return Origin(
        source=entry.take("source", str, optional=True),
        commit=entry.matching("commit", _COMMIT, "40 hexadecimal digits", optional=True),
        license=entry.take("license", str, optional=True),
        task=entry.take("task", str, optional=True),
        datasets=entry.texts("datasets"),
    )


def _made(check: Fields) -> Mapping[str, Any]:
    made = check.take("made", dict, optional=True) or {}
    try:
        json.dumps(made, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{check.where}: made holds a number that JSON does not allow: {error}") from error
    return made


def _evaluation(entry: Fields) -> Evaluation:
    optional = {name: entry.take(name, str, optional=True) for name in ("dataset_id", "split", "method")}
    return Evaluation(entry.take("dataset", str), entry.take("metric", str), entry.take("value", float), **optional)


def _picture(entry: Fields) -> Picture:
    return Picture(entry.matching("file", _PICTURE, PICTURE_RULE), entry.take("caption", str))
