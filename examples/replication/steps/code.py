"""HumanEval and MBPP, opt-in: answers are programs, and one is right when its tests pass in the sandbox."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_arrow import Task

from .data import Row, shuffled
from .sandbox import Sandbox


FOLDER = "heldout_benchmarks"
UNTIL = ("\n\n", "\ndef")  # where an answer ends, as in the paper's code
IMPORT = re.compile(r"^(?:import|from)\s.*$", re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    """One problem.

    Args:
        name (`str`): such as `mbpp/3`.
        prompt (`str`): the program up to where the answer begins, without the end of its line: tokenizers join that
            with the spaces that follow, and a model that reads it alone writes no body.
        solution (`str`): a right answer.
        tests (`str`): what follows the answer; it fails where the answer is wrong.
    """

    name: str
    prompt: str
    solution: str
    tests: str

    def program(self, answer: str) -> str:
        """The program that an answer makes."""
        return f"{self.prompt}{answer}\n{self.tests}\n"


class Passed:
    """A metric for `evaluate_library`: 1 where the tests pass, 0 where they do not."""

    name = "passed"

    def __init__(self, problems: Sequence[Problem], sandbox: Sandbox) -> None:
        self._problems = {problem.name: problem for problem in problems}
        self._sandbox = sandbox

    def compute(self, *, predictions: list[str], references: list[Sequence[str]]) -> Mapping[str, float]:
        """The mean over predictions; the last reference of each is its problem's name."""
        problems = [self._problems[names[-1]] for names in references]
        passed = [self._sandbox.passes(one.program(text)) for one, text in zip(problems, predictions, strict=True)]
        return {self.name: sum(passed) / len(passed)}


def code_tasks(folder: Path, number: int, count: int) -> tuple[list[Task], Passed]:
    """The tasks of a round of `count` problems each, and their metric; rounds share no problem.

    Problems whose own solution does not pass in the sandbox are left out.

    Raises:
        RuntimeError: there is no sandbox here.
        ValueError: the folder has no problems, or no more of them.
    """
    sandbox, chosen = Sandbox(), {}
    for name, read in (("humaneval", humaneval), ("mbpp", mbpp)):
        path = folder / FOLDER / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        part = [read(row) for row in shuffled(name, rows)[number * count : (number + 1) * count]]
        if kept := [problem for problem in part if sandbox.passes(problem.program(problem.solution))]:
            chosen[name] = kept
    if not chosen:
        raise ValueError(f"--data {str(folder)!r} holds no problems for round {number} in {FOLDER!r}.")
    tasks = [
        Task(
            f"code.{name}",
            [{"prompt": one.prompt, "completion": one.solution, "references": [one.name]} for one in part],
            until=UNTIL,
        )
        for name, part in chosen.items()
    ]
    return tasks, Passed([one for part in chosen.values() for one in part], sandbox)


def humaneval(row: Row) -> Problem:
    """A function's head and docstring; the answer is its body."""
    prompt, tests = row["input"].rstrip(), f"{row['test']}\ncheck({row['entry_point']})"
    return Problem(row["id"], prompt, f"\n{row['output']}", tests)


def mbpp(row: Row) -> Problem:
    """The head of the function that the tests call, with task and first test as its docstring, as in the paper's code.

    What the solution defines before that function is left out, but for imports.
    """
    lines, tests = row["output"].splitlines(), row["test_list"]
    heads = {found[1]: place for place, line in enumerate(lines) if (found := re.match(r"def\s+(\w+)", line))}
    called = [name for name in heads if re.search(rf"\b{name}\s*\(", tests[0])]
    start = heads[called[-1]] if called else max(heads.values(), default=0)
    space = re.match(r"\s*", lines[start + 1])[0] if len(lines) > start + 1 else ""
    told = "\n".join(f"{space}{line}".rstrip() for line in ('"""', *row["input"].splitlines(), '"""'))
    before = "".join(f"{line}\n" for line in IMPORT.findall("\n".join(lines[:start])))
    after = "\n".join([row["test_setup_code"], *tests])
    return Problem(row["id"], f"{before}{lines[start].rstrip()}\n{told}", "\n".join(["", *lines[start + 1 :]]), after)
