"""`evaluate_library`: any libraries, routers and tasks, always beside the controls."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ..library.versions import framework_versions
from .cells import RowReader
from .encoding import context_limit
from .fingerprints import base_fingerprint
from .metrics import Metric, make_scorers
from .options import JudgeOptions, make_options
from .plans import Plan, list_libraries, make_plans
from .report import FORMAT, EvaluationReport
from .running import LibraryJudge, Session
from .store import ResultStore
from .tasks import JudgedTask, Rows, list_tasks, read_task


METHODS = ("base", "uniform", "best_single", "oracle", "random", "arrow")
REPORT_JSON, REPORT_MARKDOWN = "report.json", "report.md"


def evaluate_library(
    base: torch.nn.Module | str | PathLike,
    library: Any,
    tasks: Any,
    *,
    methods: Sequence[str | Mapping[str, Any]] = METHODS,
    output_dir: str | PathLike | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    oracle: Mapping[str, str] | None = None,
    selection: Mapping[str, Rows] | None = None,
    fit_data: Mapping[str, Any] | None = None,
    metrics: Sequence[str | Metric] = ("exact_match", "rouge_l"),
    base_model_kwargs: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> EvaluationReport:
    """Judge ways to use a library on tasks, beside controls; nothing is chosen or fitted on the judged rows.

    Args:
        base (`torch.nn.Module`, `str` or `PathLike`): a causal language model, or the Hub id or folder of one.
        library: what makes an `AdapterLibrary`; or a mapping name -> library, whose methods are `name/method`.
        tasks: a mapping name -> rows or [`Task`], [`Task`]s and .jsonl files, or a folder of them; see [`read_row`].
        methods (`Sequence`): names of routers and of `methods.SPECIAL`, or dicts, see [`list_methods`].
        output_dir (`str` or `PathLike`, *optional*): keeps results, so that an interrupted run goes on; and reports.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): by default that of the base's name.
        oracle (`Mapping[str, str]`, *optional*): task -> its own expert; default: the expert of the task's name.
        selection (`Mapping`, *optional*): task -> rows for selection; default: those of its split `train`.
        fit_data (`Mapping`, *optional*): expert -> rows, for routers that are fitted; of several libraries by name.
        metrics (`Sequence`): of generated answers: built-in names, and objects of the package evaluate.
        base_model_kwargs (`Mapping`, *optional*): for the base's `from_pretrained`.
        overwrite (`bool`): use an `output_dir` that holds a report of something else.
        options: the fields of [`JudgeOptions`].

    Raises:
        ValueError: a task, method or option that is not allowed, or an `output_dir` with another report.
        ImportError: a metric needs a package that is missing.
    """
    start, chosen = time.monotonic(), make_options(options)
    model, tokenizer = load_base(base, tokenizer, base_model_kwargs)
    judged = _read_tasks(tasks, selection or {}, tokenizer, chosen)
    needs_metrics = chosen.generate and any(task.kind == "generation" for task in judged)
    reader = RowReader(tokenizer, context_limit(model), chosen, make_scorers(metrics) if needs_metrics else {})
    for task in judged:
        reader.check(task)
    plans, notes = make_plans(list_libraries(library), judged, methods, chosen, oracle or {}, fit_data)
    folder = None if output_dir is None else Path(output_dir).expanduser()
    setting = Setting(model, base_fingerprint(model), tokenizer, judged, reader, chosen)
    found = _judge_all(setting, plans, folder, overwrite)
    data = {**_describe(setting), "libraries": found, "notes": notes, "seconds": round(time.monotonic() - start, 1)}
    return _finish(EvaluationReport(data), folder)


@dataclass(frozen=True)
class Setting:
    """What is judged with: the base and its fingerprint, tokenizer, tasks, reader of rows, options."""

    model: torch.nn.Module
    base_mark: str
    tokenizer: PreTrainedTokenizerBase
    tasks: list[JudgedTask]
    reader: RowReader
    options: JudgeOptions


def load_base(
    base: torch.nn.Module | str | PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base_model_kwargs: Mapping[str, Any] | None = None,
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """The base model and its tokenizer, loaded where they are given by name.

    Raises:
        ValueError: `base_model_kwargs` for a model that is loaded, or a tokenizer that cannot be found.
    """
    if isinstance(base, torch.nn.Module):
        if base_model_kwargs:
            raise ValueError(f"base_model_kwargs={dict(base_model_kwargs)!r} goes with a base given by name.")
        name = getattr(base, "name_or_path", "")
        if tokenizer is None and not name:
            raise ValueError("tokenizer is missing, and the base has no name to find it by.")
        return base, tokenizer or AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(str(base), **(base_model_kwargs or {}))
    return model.eval(), tokenizer or AutoTokenizer.from_pretrained(str(base))


def _read_tasks(
    tasks: Any, selection: Mapping[str, Rows], tokenizer: PreTrainedTokenizerBase, options: JudgeOptions
) -> list[JudgedTask]:
    given = list_tasks(tasks)
    names = [task.name for task in given]
    unknown = [name for name in selection if name not in names]
    if unknown:
        raise ValueError(f"selection names the task {unknown[0]!r}, which is not judged; the tasks are {names}.")
    limits = {"max_rows": options.max_rows, "selection_rows": options.selection_rows}
    return [
        read_task(replace(task, selection=selection.get(task.name, task.selection)), tokenizer, **limits)
        for task in given
    ]


def _judge_all(setting: Setting, plans: Mapping[str, Plan], folder: Path | None, overwrite: bool) -> dict[str, dict]:
    """Library -> its results; the base's mode is as before afterwards."""
    what = {
        "base": {"base": setting.base_mark},
        "libraries": {label: plan.mark for label, plan in plans.items()},
        "tasks": {task.name: task.fingerprint for task in setting.tasks},
    }
    store = ResultStore(folder, what, overwrite)
    found, was_training = {}, setting.model.training
    total = sum(plan.count_results(setting.tasks) for plan in plans.values())
    try:
        with tqdm(total=total, desc="judging", unit="result") as bar:
            session = Session(
                setting.model, setting.base_mark, setting.tokenizer, setting.tasks, setting.reader, store, bar
            )
            for label, plan in plans.items():
                found[label] = LibraryJudge(session, label, plan).run()
    finally:
        setting.model.train(was_training)
    return found


def _describe(setting: Setting) -> dict[str, Any]:
    name = getattr(setting.model, "name_or_path", "") or type(setting.model).__name__
    tasks = {
        task.name: {
            "kind": task.kind,
            "rows": len(task.rows),
            "selection_rows": len(task.selection),
            "repeated": task.repeated,
            "fingerprint": task.fingerprint,
        }
        for task in setting.tasks
    }
    return {
        "format": FORMAT,
        "base": {"name": str(name), "fingerprint": setting.base_mark},
        "tasks": tasks,
        "settings": asdict(setting.options),
        "versions": framework_versions(),
    }


def _finish(report: EvaluationReport, folder: Path | None) -> EvaluationReport:
    """Write the report beside the results, where they are kept."""
    if folder is not None:
        report.to_json(folder / REPORT_JSON)
        (folder / REPORT_MARKDOWN).write_text(report.to_markdown(), encoding="utf-8")
    return report
