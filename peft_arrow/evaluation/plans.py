"""What is to be judged of each library: which methods, with which of its experts; and what is left out, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from ..library.library import AdapterLibrary
from ..library.manifest import MANIFEST_NAME
from .fingerprints import library_fingerprint, rows_fingerprint
from .methods import Method, list_methods
from .options import JudgeOptions
from .rows import read_row
from .tasks import JudgedTask, own_experts


@dataclass(frozen=True)
class Plan:
    """What is judged of one library.

    Args:
        library (`AdapterLibrary`): the experts; `mark` is their fingerprint.
        methods (`list[Method]`): in the order of the tables.
        own (`Mapping[str, str]`): task -> its own expert, where known.
        options (`JudgeOptions`): of the report.
        fit_data (`Mapping`, *optional*): expert -> rows; `fit_mark` is their fingerprint.
        fit_repeated (`int`): judged rows that are also among those.
    """

    library: AdapterLibrary = field(repr=False)
    mark: str
    methods: list[Method]
    own: Mapping[str, str]
    options: JudgeOptions
    fit_data: Mapping[str, Iterable[Any]] | None = field(default=None, repr=False)
    fit_mark: str | None = None
    fit_repeated: int = 0

    def count_results(self, tasks: Sequence[JudgedTask]) -> int:
        """How many results this brings, for the bar."""
        judged = sum(
            len(method.seeds) * (len(self.own) if method.kind == "oracle" else len(tasks)) for method in self.methods
        )
        return judged + (len(self.library) + 1) * sum(bool(task.selection) for task in tasks)


def list_libraries(library: Any) -> dict[str, AdapterLibrary]:
    """The libraries by name; one that is given without a name has the name "".

    Raises:
        ValueError: a reference that cannot be read, or a name with a slash.
    """
    if isinstance(library, AdapterLibrary):
        return {"": library}
    if isinstance(library, Mapping) and library and all(map(_is_library, library.values())):
        wrong = [name for name in library if not name or "/" in name]
        if wrong:
            raise ValueError(f"library holds the name {wrong[0]!r}; a name has at least one character and no '/'.")
        return {name: _read(entry) for name, entry in library.items()}
    return {"": _read(library)}


def _is_library(entry: Any) -> bool:
    if isinstance(entry, (str, PathLike)):
        return (Path(entry).expanduser() / MANIFEST_NAME).is_file()
    return isinstance(entry, AdapterLibrary)


def _read(entry: Any) -> AdapterLibrary:
    return entry if isinstance(entry, AdapterLibrary) else AdapterLibrary.from_pretrained(entry)


def make_plans(
    libraries: Mapping[str, AdapterLibrary],
    tasks: Sequence[JudgedTask],
    methods: Sequence[str | Mapping[str, Any]],
    options: JudgeOptions,
    oracle: Mapping[str, str],
    fit_data: Mapping[str, Any] | None,
) -> tuple[dict[str, Plan], list[str]]:
    """The plan of each library, and what was left out of them.

    Args:
        libraries (`Mapping`): by name.
        tasks (`Sequence[JudgedTask]`): the tasks.
        methods (`Sequence`): as asked for.
        options (`JudgeOptions`): of the report.
        oracle (`Mapping[str, str]`): task -> its own expert.
        fit_data (`Mapping`, *optional*): as given.

    Raises:
        ValueError: a method that cannot be judged: an unknown expert, or no rows to fit a router with; without
            controls also no own experts, and no rows for selection.
    """
    listed = list_methods(methods, controls=options.controls, seeds=options.seeds, lora_seeds=options.lora_seeds)
    plans, notes = {}, []
    for label, library in libraries.items():
        own = own_experts(tasks, list(library), oracle, is_only=len(libraries) == 1)
        rows = fit_data.get(label) if fit_data is not None and label else fit_data
        for method in listed:
            _check(method, library, rows)
        missing = _missing(own, tasks)
        kept = [method for method in listed if method.kind not in missing]
        for method in listed:
            if method.kind in missing:
                told = f"{f'{label}/' if label else ''}{method.name} is left out: {missing[method.kind]}."
                if not options.controls:
                    raise ValueError(told)
                notes.append(told)
        fit = {name: list(part) for name, part in rows.items()} if rows and any(m.needs_data for m in kept) else None
        plans[label] = Plan(
            library,
            library_fingerprint(library),
            kept,
            own,
            options,
            fit,
            rows_fingerprint(fit) if fit else None,
            _repeated(fit, tasks) if fit else 0,
        )
    return plans, notes


def _missing(own: Mapping[str, str], tasks: Sequence[JudgedTask]) -> dict[str, str]:
    """Kind of method -> why it cannot be judged."""
    found = {}
    if not own:
        found["oracle"] = "no task has an expert of its own (give oracle={task: expert})"
    if not any(task.selection for task in tasks):
        found["best_single"] = "no task has rows for selection (a split 'train', or selection=)"
    return found


def _check(method: Method, library: AdapterLibrary, fit_data: Mapping[str, Iterable[Any]] | None) -> None:
    if method.kind == "pinned":
        named = [method.experts] if isinstance(method.experts, str) else list(method.experts)
        unknown = [name for name in named if name not in library]
        if unknown:
            raise ValueError(f"method {method.name!r}: expert {unknown[0]!r} is not in the library: {list(library)}.")
    if not method.needs_data:
        return
    if fit_data is None:
        raise ValueError(
            f"method {method.name!r} has to be fitted first, and fit_data is missing; give fit_data={{expert: rows}}."
        )
    if sorted(fit_data) != sorted(library):
        raise ValueError(
            f"method {method.name!r}: fit_data is of experts {list(fit_data)}, and the library has {list(library)}: "
            "a router that is fitted for other experts cannot be used."
        )


def _repeated(fit_data: Mapping[str, Sequence[Any]], tasks: Sequence[JudgedTask]) -> int:
    """How many judged rows are among those for fitting, by prompt and answer."""
    known = set()
    for rows in fit_data.values():
        for row in rows:
            if (
                isinstance(row, Mapping)
                and ("prompt" in row or "instruction" in row)
                and not isinstance(row.get("prompt"), list)
            ):
                found = read_row(row, "fit_data")
                known.add((found.prompt.strip(), found.references[0].strip()))
    return sum((row.prompt.strip(), row.references[0].strip()) in known for task in tasks for row in task.rows)
