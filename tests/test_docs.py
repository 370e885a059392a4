"""Every Python block of the README and the docs runs, offline, on a CPU; every command shown exists."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from datasets import Dataset

from peft_arrow.cli import make_parser
from tests.pico import pico_adapter, pico_base


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A command of a page may also set up a clone; nothing else is shown.
SET_UP = [r"git clone \S+", r"cd peft-arrow", r"python3?(\.\d+)? -m venv \S+", r"source \S+/bin/activate"]


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Return the fenced blocks of one language as (line, text)."""
    text = page.read_text()
    return [(text[: m.start()].count("\n") + 2, m[2]) for m in FENCE.finditer(text) if m[1] == language]


@pytest.fixture
def reader_folder(tmp_path, tokenizer, monkeypatch):
    """A folder as the reader of the docs has it: `my-base/` and four adapters under `adapters/`."""
    pico_base().save_pretrained(tmp_path / "my-base")
    tokenizer.save_pretrained(tmp_path / "my-base")
    pico_adapter(tmp_path / "adapters/plurals", seed=1, r=4, target_modules=["q_proj", "v_proj"])
    pico_adapter(tmp_path / "adapters/dates", seed=2, r=8, target_modules=["q_proj", "v_proj", "o_proj"])
    pico_adapter(tmp_path / "adapters/sql", seed=3, r=2, target_modules=["q_proj", "down_proj"])
    pico_adapter(tmp_path / "adapters/currencies", seed=4, r=4, target_modules=["q_proj", "v_proj"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def reader_names(tokenizer) -> dict:
    """What a page may use without making it: a fresh base, a tokenizer, prompts, a batch, a small data set."""
    prompts = ["plural of fish:", "3 May 1999 ->"]
    rows = [{"prompt": f"plural of item{i}:", "completion": f" item{i}s"} for i in range(8)]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    return {
        "base": pico_base(),
        "tokenizer": tokenizer,
        "prompts": prompts,
        "batch": batch,
        "dataset": Dataset.from_list(rows),
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, reader_folder, tokenizer):
    names = {"__name__": "__main__", **reader_names(tokenizer)}
    for line, text in blocks(page, "python"):
        # A block starts from an untouched base, as a reader who runs that block does; models it made live on.
        names["base"] = pico_base()
        # Blank lines in front make a traceback name the line of the page.
        exec(compile("\n" * (line - 1) + text, str(page), "exec"), names)  # noqa: S102


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for line, text in blocks(page, "bash"):
            joined = text.replace("\\\n", " ").splitlines()
            found += [(f"{page.name}:{line}", command) for command in joined if command.split("#")[0].strip()]
    return found


@pytest.mark.parametrize(("place", "command"), commands())
def test_commands_exist(place, command):
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        asked = [word for word in words[1:] if "=" not in word]
        assert set(asked) <= targets, f"{place}: the Makefile has no target {sorted(set(asked) - targets)}"
    elif words[0].endswith("peft-arrow") and len(words) > 1:
        assert_options_exist(place, words[1:])
    elif "pip" in words:
        extras = re.findall(r"\[([\w,]+)\]", command)
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert {name for group in extras for name in group.split(",")} <= set(known), place
    elif words[0].endswith("python") and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), f"{place}: there is no {words[1]}"
    elif words[0].endswith("python") and words[1] == "-m":
        module = ROOT.joinpath(*words[2].split("."))
        assert module.with_suffix(".py").is_file() or module.is_dir(), f"{place}: there is no module {words[2]}"
    else:
        assert any(re.fullmatch(pattern, " ".join(words)) for pattern in SET_UP), (
            f"{place}: unknown command {command!r}"
        )


def assert_options_exist(place: str, words: list[str]) -> None:
    """Check a `peft-arrow` command against its own help text."""
    asked = [words[0], "--help"] if not words[0].startswith("-") else ["--help"]
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told), pytest.raises(SystemExit) as left:
        make_parser().parse_args(asked)
    assert left.value.code == 0, f"{place}: peft-arrow {words[0]} does not exist\n{told.getvalue()}"
    for option in [word.split("=")[0] for word in words[1:] if word.startswith("-")]:
        assert option in told.getvalue(), f"{place}: peft-arrow {words[0]} has no option {option}"
