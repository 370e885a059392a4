"""What is judged: rows of all suites, each library in the ways of a group."""

from __future__ import annotations

from typing import Any

from peft_arrow import AdapterLibrary, Task, evaluate_library, merge_adapters

from .code import code_tasks
from .data import plain
from .setting import Setting
from .ways import NEED_DATA, WRITTEN, has_own, methods_of


def judge(setting: Setting, library: str, group: str, number: int) -> None:
    """Judge one library on the rows of one round; what is kept in the folder is not judged again."""
    model, tokenizer = setting.base
    options, groups, experts = setting.config["judging"], setting.groups(library), setting.library(library)
    tasks, oracle, metrics = tasks_of(setting, library, group, number)
    found = evaluate_library(
        model,
        canonical(experts) if group == "canonical" else experts,
        tasks,
        methods=methods_of(group, library),
        output_dir=setting.root / "judged" / f"{library}-{group}-{number}",
        tokenizer=tokenizer,
        oracle=oracle,
        fit_data=fit_rows(setting, groups, options["fit_rows"][group]) if group in NEED_DATA else None,
        controls=False,
        metrics=metrics,
        generate=group in WRITTEN,
        max_new_tokens=options["code_tokens" if group == "code" else "answer_tokens"],
        top_k=options["top_k"],
        selection_rows=0,
        traced_rows=2,
    )
    setting.write(f"reports/{library}-{group}-{number}.json", found.data)


def tasks_of(
    setting: Setting, library: str, group: str, number: int
) -> tuple[list[Task], dict[str, str] | None, list[Any]]:
    """The tasks of a round, their own experts, and the metrics of written answers."""
    counts, suites = setting.config["judging"]["rows"], setting.suites
    if group == "code":
        tasks, passed = code_tasks(setting.data, number, counts["code"])
        return tasks, None, [passed]
    rows = suites.round(number, counts)
    if group == "generated":  # also where options could be scored
        rows = {task: plain(part) for task, part in rows.items() if task in suites.judged["sni"]}
    tasks = [Task(f"{suites.suite_of(task)}.{task}", part) for task, part in rows.items()]
    members = setting.groups(library) if has_own(library) else {}
    own = {task: expert for expert, its in members.items() for task in its}
    return tasks, {task.name: own[name] for task, name in zip(tasks, rows) if name in own} or None, ["rouge_l"]


def fit_rows(setting: Setting, groups: dict[str, list[str]], count: int) -> dict[str, list[Any]]:
    """So many training rows of each expert, from all its tasks in turn."""
    train, found = setting.suites.train, {}
    for expert, tasks in groups.items():
        turns = [row for rows in zip(*(train[task][:count] for task in tasks)) for row in rows]
        found[expert] = plain(turns[:count])
    return found


def canonical(library: AdapterLibrary) -> AdapterLibrary:
    """The same updates written as U sqrt(S) and sqrt(S) V^T of their singular value decomposition."""
    rewritten = {name: merge_adapters({name: expert}, name=name).adapter for name, expert in library.items()}
    return AdapterLibrary(rewritten, library.base_model_name_or_path)
