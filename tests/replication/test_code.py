"""Written programs: run in the sandbox or not at all, and right where their tests pass."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.pico import pico_adapter, pico_base, pico_tokenizer


needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
HUMANEVAL = {
    "id": "humaneval/0",
    "input": 'def twice(x):\n    """Return 2 x."""\n',
    "output": "    return 2 * x\n",
    "options": None,
    "test": "def check(candidate):\n    assert candidate(3) == 6\n",
    "entry_point": "twice",
}
MBPP = {
    "id": "mbpp/7",
    "input": "Write a function to take a root.\nassert root(4)==2",
    "output": "import math\ndef helper(x):\n  return x\ndef root(x):\n\treturn math.sqrt(x)",
    "options": None,
    "test_list": ["assert root(4)==2", "assert root(9)==THREE"],
    "test_setup_code": "THREE = 3",
}


@pytest.fixture
def no_walls(tmp_path, monkeypatch):
    """A `bwrap` that only runs what it is given, for programs of these tests: most machines of CI have none."""
    python = Path(sys.executable).resolve()
    script = tmp_path / "bin" / "bwrap"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nwhile [ "$1" != "{python}" ]; do shift; done\nexec "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")


def test_without_bubblewrap_nothing_is_run(monkeypatch, tmp_path):
    from steps.sandbox import Sandbox

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="'bwrap' is not installed.*leave 'code' out"):
        Sandbox()
    (tmp_path / "bwrap").write_text(f"#!{shutil.which('sh', path='/bin:/usr/bin')}\necho no namespaces >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    with pytest.raises(RuntimeError, match="cannot make a sandbox here, so no code is run: no namespaces"):
        Sandbox()


@pytest.mark.parametrize(
    ("program", "passes"),
    [
        ("x = 1", True),
        ("assert False", False),
        ("not python", False),
        ("raise SystemExit", False),
        ("import os; os._exit(0)", False),
        ("x = 'a' * (1 << 31)", False),
        ("if __name__ == '__main__':\n    1 / 0", False),
        ("print('\\ud800'.encode('utf-8', 'replace'))", True),
    ],
)
def test_a_program_passes_when_it_runs_to_its_end(no_walls, program, passes):
    from steps.sandbox import Sandbox

    assert Sandbox().passes(program) is passes


@needs_bwrap
def test_the_sandbox_has_walls(monkeypatch, tmp_path):
    from steps import sandbox

    (tmp_path / "secret").write_text("x")
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    box = sandbox.Sandbox()
    assert box.passes("import os; assert os.listdir('.') == [] and 'SECRET' not in os.environ")
    assert box.passes("open('kept', 'w').write('x')") and box.passes("import os; assert os.listdir('.') == []")
    for program in (
        f"open({str(tmp_path / 'secret')!r})",
        f"open({str(Path(__file__).resolve())!r})",
        "open('/etc/passwd')",
        "open('/usr/new', 'w')",
        "import socket; socket.create_connection(('127.0.0.1', 9), 1)",
        "import socket; assert [name for _, name in socket.if_nameindex() if name != 'lo']",
        f"import os; os.kill({os.getpid()}, 0)",
        "open('large', 'wb').write(b'a' * (2 << 20))",
        "while True: pass",
    ):
        assert not box.passes(program), program


def test_problems():
    """The answer begins where the body does; tests and imports are there, other functions of a solution are not."""
    from steps.code import humaneval, mbpp

    first, second = humaneval(HUMANEVAL), mbpp(MBPP)
    assert first.program(first.solution).startswith(f"{HUMANEVAL['input']}{HUMANEVAL['output']}")
    assert first.tests.endswith("check(twice)") and "helper" not in second.prompt
    told = 'import math\ndef root(x):\n\t"""\n\tWrite a function to take a root.\n\tassert root(4)==2\n\t"""'
    assert second.prompt == told and second.solution == "\n\treturn math.sqrt(x)"
    answers = [(first, "\n    return x + x", "\n    return x"), (second, "\n\treturn x ** 0.5", "\n\tpass")]
    for problem, right, wrong in answers:
        exec(problem.program(right), {})
        with pytest.raises(AssertionError):
            exec(problem.program(wrong), {})


def test_answers_are_judged_by_their_tests(no_walls, tmp_path):
    """Through the judge, over the one problem whose own solution passes."""
    from steps.code import code_tasks

    from peft_arrow import AdapterLibrary, evaluate_library

    folder = tmp_path / "heldout_benchmarks"
    folder.mkdir()
    broken = {**HUMANEVAL, "id": "humaneval/1", "output": "    return 0\n"}
    (folder / "humaneval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (HUMANEVAL, broken)))
    with pytest.raises(ValueError, match="holds no problems for round 1"):
        code_tasks(tmp_path, 1, 2)
    (task,), passed = code_tasks(tmp_path, 0, 2)
    assert task.name == "code.humaneval" and [row["references"] for row in task.rows] == [["humaneval/0"]]
    answers = {"\n    return x + x": 1.0, "\n    return 1": 0.0, "": 0.0, "\n    import os; os._exit(0)": 0.0}
    for answer, value in answers.items():
        told = passed.compute(predictions=[answer], references=[["\n    return 2 * x\n", "humaneval/0"]])
        assert told == {"passed": value}
    report = evaluate_library(
        pico_base(),
        AdapterLibrary.from_pretrained([pico_adapter(tmp_path / "one", seed=0)], base_model="pico"),
        [task],
        methods=["base"],
        tokenizer=pico_tokenizer(),
        metrics=[passed],
        max_new_tokens=4,
        controls=False,
        output_dir=tmp_path / "judged",
    )
    (cell,) = report.data["libraries"][""]["methods"]["base"]["runs"][0]["tasks"].values()
    assert cell["values"]["passed"] == [0.0] and "loss" in cell["values"]


def test_code_is_opt_in_and_shown_beside_the_papers():
    from report.collect import MEASURES
    from report.tables import NOT_RUN, code
    from steps.setting import read_config
    from steps.ways import methods_of

    from tests.replication.conftest import FOLDER

    assert "code" not in read_config(FOLDER / "config.yaml")["judging"]["groups"] and "code" in MEASURES
    assert methods_of("code", "private-0")[0] == "base"
    told = {"by_task": {"humaneval": 0.125, "mbpp": 0.0}, "items": 16}
    lines = code({3: {"methods": {"base": {"code": told}}}}).splitlines()
    assert lines[2] == "| ours | Base | 12.5 | 0.0 | 3 / 16 |"
    assert lines[3] == "| Phi-2 | Base | 45.1 | 56.0 | – |" and code({}) == NOT_RUN
