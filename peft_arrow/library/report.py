"""What vetting found out about adapters: one report an adapter, and the reports of many with what only many show."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, overload

from .delta import NearDuplicate
from .report_text import reports_text
from .spectrum import Outlier


class Finding(str):
    """One thing found, as a sentence that says what to do; `code` names its kind, such as `"wrong_base"`."""

    code: str

    def __new__(cls, code: str, text: str) -> Finding:
        finding = super().__new__(cls, text)
        finding.code = code
        return finding

    def __getnewargs__(self) -> tuple[str, str]:
        return self.code, str(self)


@dataclass(frozen=True)
class AdapterReport:
    """What was found out about one adapter.

    Args:
        name (`str`): the expert name it would get.
        source (`str`): where it lies.
        problems (`tuple[Finding, ...]`): why it cannot be used; without any, `ok` is True.
        warnings (`tuple[Finding, ...]`): what to know before using it.
        notes (`tuple[Finding, ...]`): what matters elsewhere, such as for serving with vLLM.
        rank (`int`, *optional*): the largest rank of a module; `ranks`: all that occur.
        alpha (`float`, *optional*): `lora_alpha`.
        target_modules (`tuple[str, ...]`): last parts of the names of its modules.
        license (`str`, *optional*): the Hub's identifier, `"other"`, or None where none is stated.
        size (`int`, *optional*): bytes of the weights' file; of the Hub those of its tensors.
        parameters (`int`, *optional*): how many numbers the file holds.
        base_model (`str`, *optional*): what its config names.
        commit (`str`, *optional*): of the Hub.
        datasets (`tuple[str, ...]`): what its card names.
        task_type (`str`, *optional*): PEFT's.
        weights_read (`bool`): whether the weights were looked at, and not only their shapes.
        statistics (`Mapping[str, float]`, *optional*): of the update, see `peft_arrow.library.spectrum`.
        downloads (`int`, *optional*): of the last month, where it was found by `AdapterLibrary.discover`.
    """

    name: str
    source: str
    problems: tuple[Finding, ...] = ()
    warnings: tuple[Finding, ...] = ()
    notes: tuple[Finding, ...] = ()
    rank: int | None = None
    ranks: tuple[int, ...] = ()
    alpha: float | None = None
    target_modules: tuple[str, ...] = ()
    license: str | None = None
    size: int | None = None
    parameters: int | None = None
    base_model: str | None = None
    commit: str | None = None
    datasets: tuple[str, ...] = ()
    task_type: str | None = None
    weights_read: bool = False
    statistics: Mapping[str, float] | None = None
    downloads: int | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against using it as an expert."""
        return not self.problems

    def table(self, width: int | None = None) -> str:
        """The report as text for people; see `AdapterReports.table`."""
        return AdapterReports((self,)).table(width)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON knows it; a finding is an object of `code` and `text`."""
        content: dict[str, Any] = {"name": self.name, "source": self.source, "ok": self.ok}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("problems", "warnings", "notes"):
                value = [{"code": finding.code, "text": str(finding)} for finding in value]
            content[field.name] = _plain(value)
        return content

    def to_json(self) -> str:
        """The text of `to_dict`; ASCII alone, so that nothing in it steers a terminal."""
        return json.dumps(self.to_dict(), indent=1)


@dataclass(frozen=True)
class AdapterReports(Sequence[AdapterReport]):
    """The reports of many adapters, in order, and what only shows when they are compared.

    Args:
        reports (iterable of `AdapterReport`): one an adapter.
        base (`str`, *optional*): the base model they were judged against, as a sentence is to name it.
        duplicates (`tuple[NearDuplicate, ...]`): pairs of nearly the same update.
        outliers (`tuple[Outlier, ...]`): adapters whose statistics differ from the others'; no verdict.
        remarks (`tuple[str, ...]`): what was not looked at, and why.
    """

    reports: tuple[AdapterReport, ...]
    base: str | None = None
    duplicates: tuple[NearDuplicate, ...] = ()
    outliers: tuple[Outlier, ...] = ()
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "reports", tuple(self.reports))

    @overload
    def __getitem__(self, position: int) -> AdapterReport: ...

    @overload
    def __getitem__(self, position: slice) -> AdapterReports: ...

    def __getitem__(self, position: int | slice) -> AdapterReport | AdapterReports:
        chosen = self.reports[position]
        return chosen if isinstance(chosen, AdapterReport) else AdapterReports(chosen, self.base)

    def __len__(self) -> int:
        return len(self.reports)

    def __iter__(self) -> Iterator[AdapterReport]:
        return iter(self.reports)

    def __str__(self) -> str:
        return self.table()

    def table(self, width: int | None = None) -> str:
        """One line an adapter, then what was found in full sentences; plain text.

        Args:
            width (`int`, *optional*): characters a line; by default the terminal's, and 100 where there is none.
        """
        return reports_text(self, width)

    def to_dict(self) -> dict[str, Any]:
        """The reports and the comparisons as JSON knows them."""
        return {
            "base": self.base,
            "adapters": [report.to_dict() for report in self.reports],
            "duplicates": [_plain(asdict(pair)) for pair in self.duplicates],
            "outliers": [_plain(asdict(outlier)) for outlier in self.outliers],
            "remarks": list(self.remarks),
        }

    def to_json(self, path: str | PathLike | None = None) -> str:
        """The text of `to_dict`, ASCII alone; also written to `path` where one is given."""
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text


def _plain(value: Any) -> Any:
    """The value in what JSON has forms for; NaN and Inf have none."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
