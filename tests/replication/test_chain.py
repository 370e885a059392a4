"""The whole chain on a pico base: killed five times, it ends with the tables of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.pico import pico_base, pico_tokenizer
from tests.processes import environment
from tests.replication.conftest import FOLDER


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """A folder with a pico base, made-up tasks, and the smoke run's config for them."""
    folder = tmp_path_factory.mktemp("replication")
    pico_base().save_pretrained(folder / "base")
    pico_tokenizer().save_pretrained(folder / "base")
    config = yaml.safe_load((FOLDER / "smoke.yaml").read_text())
    # `make replication-smoke` runs all of it; here one of each kind of piece is enough.
    config |= {"base": str(folder / "base"), "dtype": "float32", "waves": [["private", "mbc"]]}
    config["judging"]["groups"] = {"core": ["private", "mbc"]}
    kept = ("scratch", "mbc-poly", "mbc-lorahub")
    config["adapting"]["methods"] = {way: config["adapting"]["methods"][way] for way in kept}
    config["analyses"]["pairs"] = 1
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    words = [
        sys.executable,
        "-c",
        "import sys; from pathlib import Path; from steps.made_up import write_made_up as w; w(Path(sys.argv[1]))",
    ]
    subprocess.run([*words, str(folder / "data")], check=True, cwd=FOLDER, env=environment())
    return folder


def start(ground: Path, output: str, *more: str) -> subprocess.Popen:
    words = [sys.executable, str(FOLDER / "replicate.py"), "--config", str(ground / "config.yaml")]
    words += ["--data", str(ground / "data"), "--output", str(ground / output), *more]
    with (ground / f"{output}.log").open("a") as log:
        return subprocess.Popen(words, stdout=log, stderr=log, env=environment(), start_new_session=True)


def finish(ground: Path, output: str, process: subprocess.Popen) -> dict:
    """The results of a run, without what it took."""
    assert process.wait(timeout=540) == 0, (ground / f"{output}.log").read_text()[-3000:]
    results = json.loads((ground / output / "results-0.json").read_text())
    return {key: value for key, value in results.items() if key not in ("costs", "large")}


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_killed_five_times_gives_the_same_tables(ground):
    """At drawn moments, by SIGKILL, two workers at a time; undisturbed it is one."""
    whole = finish(ground, "whole", start(ground, "whole"))
    draw, pieces = random.Random(0), len(list((ground / "whole" / "done").iterdir()))
    done = []
    for number in range(5):
        process = start(ground, "killed", "--workers", "2")
        wanted, began = (number + 1) * pieces // 7, time.monotonic()
        while len(done) < wanted and process.poll() is None and time.monotonic() < began + 200:
            done = list((ground / "killed" / "done").glob("*.json"))
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 1.5))
        assert process.poll() is None, (ground / "killed.log").read_text()[-3000:]
        kill(process)
    assert finish(ground, "killed", start(ground, "killed")) == whole
    assert len(list((ground / "killed" / "done").iterdir())) == pieces
    assert {"losses.png", "layers.png", "supervised.png"} <= {
        path.name for path in (ground / "whole/figures").iterdir()
    }
    assert all(told["verdict"] in ("held", "reversed", "open", "not run") for told in whole["claims"])


def call(monkeypatch, *words: object) -> None:
    """The script in this process; it takes ten seconds to start another."""
    import replicate

    monkeypatch.setattr(sys, "argv", ["replicate.py", *map(str, words)])
    replicate.main()


def test_pieces_are_listed_with_what_they_wait_for(ground, monkeypatch, capsys):
    words = ["--config", ground / "config.yaml", "--data", ground / "data", "--output", ground / "none"]
    with pytest.raises(SystemExit) as left:
        call(monkeypatch, *words, "--list")
    assert left.value.code is None
    names = [line.partition(" ")[2] for line in capsys.readouterr().out.splitlines() if line.startswith("left ")]
    assert len(names) == len(set(names)) and names.index("train-mbc-0") < names.index("judge-mbc-0-core-0")
    with pytest.raises(SystemExit):
        call(monkeypatch, *words, "--list", "--only", "adapt-*-0.1-", "pair-")
    chosen = [line.partition(" ")[2] for line in capsys.readouterr().out.splitlines() if line.startswith("left ")]
    assert chosen == [name for name in names if name.startswith(("adapt-", "pair-")) and "base" not in name]
    assert not (ground / "none").exists()


def test_bad_arguments(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="--output and --data are needed"):
        call(monkeypatch, "--output", "x")
    with pytest.raises(ValueError, match="holds no rows"):
        call(monkeypatch, "--data", "nowhere", "--output", "x")


def test_a_library_in_no_wave_is_named(ground, monkeypatch, tmp_path):
    """Pairs are compared with private experts."""
    config = yaml.safe_load((ground / "config.yaml").read_text())
    config["waves"] = [["mbc"]]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    words = ["--config", tmp_path / "config.yaml", "--data", ground / "data", "--output", tmp_path / "none"]
    with pytest.raises(ValueError, match="pairs-0 needs the library private-0"):
        call(monkeypatch, *words, "--list")


def test_libraries_without_own_experts_have_no_oracle(ground, monkeypatch, capsys):
    """In random examples every expert saw rows of every task: none is a task's own, and no routing is right."""
    from steps.ways import methods_of

    named = [way if isinstance(way, str) else way["name"] for way in methods_of("core", "random_examples-0")]
    assert "arrow" in named and "oracle" not in named and "oracle" in methods_of("core", "mbc-0")
    words = ["--config", FOLDER / "smoke.yaml", "--data", ground / "data", "--output", ground / "none"]
    with pytest.raises(SystemExit):
        call(monkeypatch, *words, "--list")
    names = [line.partition(" ")[2] for line in capsys.readouterr().out.splitlines()]
    assert {"judge-random_examples-0-core-0", "similarity-random_examples-0", "routing-mbc-0"} <= set(names)
    assert not {"routing-random_examples-0", "routing-shared-0"} & set(names)


def test_another_seed_is_all_of_it_once_more(ground, monkeypatch, capsys):
    """Only the base is what it was."""
    names = []
    for seed in (0, 3):
        words = ["--config", FOLDER / "config.yaml", "--data", ground / "data", "--output", ground / "none"]
        with pytest.raises(SystemExit):
            call(monkeypatch, *words, "--list", "--seed", seed)
        names.append([line.partition(" ")[2] for line in capsys.readouterr().out.splitlines()])
    first, other = map(set, names)
    assert len(names[0]) == len(names[1]) > 50 and first & other == {"adapt-base"}
    assert {"train-mbc-3", "judge-shared-3-core-0", "pair-3-0", "adapt-scratch-doubled-1.0-3"} <= other


def test_a_config_may_be_like_another(tmp_path):
    """Its lines take the place of the other's, those of its own parts one by one."""
    from steps.setting import read_config

    (tmp_path / "first.yaml").write_text("steps: 1\npart: {a: 1, b: {c: 2}}\nlist: [1]\n")
    (tmp_path / "second.yaml").write_text("like: first.yaml\npart: {b: {d: 3}}\nlist: []\n")
    (tmp_path / "third.yaml").write_text("like: second.yaml\nsteps: 4\n")
    assert read_config(tmp_path / "third.yaml") == {"steps": 4, "part": {"a": 1, "b": {"d": 3}}, "list": []}


def test_budgets_differ_in_their_steps_alone():
    from steps.setting import read_config

    few, many, whole = (read_config(FOLDER / f"{name}.yaml") for name in ("budget-20", "budget-80", "config"))
    assert few["training"]["steps"] == whole["training"]["steps"] and many["training"]["steps"] == 80
    for config in (few, many):
        config["training"].pop("steps")
    assert (few.pop("name"), many.pop("name")) == ("budget-20", "budget-80") and few == many
    assert few["training"] == {key: value for key, value in whole["training"].items() if key != "steps"}


def test_some_tasks_are_chosen(ground):
    from steps.data import read_suites

    found = read_suites(ground / "data", {"upstream": ["plural"], "sni": None, "benchmarks": []})
    assert found.upstream == ["plural"] and list(found.judged["sni"]) == ["doubled", "last_letter"]
    assert found.judged["benchmarks"] == {} and set(found.train) == {"plural", "doubled", "last_letter"}
    with pytest.raises(ValueError, match="no rows in 'train_suite'"):
        read_suites(ground / "data", {"upstream": ["unknown"]})


def test_waiting_is_told(ground, tmp_path):
    """Chosen pieces may wait for one that was not chosen: another process may be at it, or the choice was wrong."""
    from steps.pieces import Piece, work
    from steps.setting import read_setting

    setting, lines, ran = read_setting(ground / "config.yaml", tmp_path, ground / "data"), [], []

    def told(line: str) -> None:
        lines.append(line)
        if "waiting" in line:
            setting.write("done/train-mbc-0.json", {})

    work(setting, [Piece("judge-mbc-0-core-0", lambda _: ran.append(1), ("train-mbc-0",))], told)
    assert lines[0] == "waiting until another process has done train-mbc-0"
    assert lines[1].startswith("judge-mbc-0-core-0: 0 s, 0 or fewer left") and ran == [1]
