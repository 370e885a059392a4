"""Saves, pulls and pushes that are killed at random moments; `test_kills` runs this as a process.

What is killed is a fork of this process, which has imported everything already: so one attempt costs little time.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import tqdm
from huggingface_hub import HfApi

from peft_arrow import Adapter, AdapterLibrary
from tests.library.hub_runs import BASE, Hub, files_of, run_checks


API = HfApi()
WEIGHTS = "adapter_model.safetensors"
KILLS, FEWEST = 20, 12
NAMES = {"old": [f"old-{number}" for number in range(8)], "new": [f"new-{number}" for number in range(6)]}
RANKS = {"old": 12, "new": 16}
STEPS = (("A", 1), ("B", -1))
MODULE = "base_model.model.model.layers.{}.self_attn.q_proj"


def make(kind: str, mark: int, layers: int = 8) -> AdapterLibrary:
    """A library of the kind; the weights of expert `n` are all `mark + n / 64`, 200 kilobytes a layer."""
    rank, modules = RANKS[kind], [MODULE.format(layer) for layer in range(layers)]
    shapes = {f"{module}.lora_{side}.weight": (rank, 2048)[::step] for module in modules for side, step in STEPS}
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
    config["base_model_name_or_path"] = BASE
    return AdapterLibrary(
        [
            Adapter(name, config, {key: torch.full(shape, mark + number / 64) for key, shape in shapes.items()})
            for number, name in enumerate(NAMES[kind])
        ]
    )


def inspect(library: Mapping[str, Adapter], files: list[str]) -> tuple[str, int]:
    """The kind and the mark of a library that is whole: names, files, sums, ranks and values fit together."""
    kind = "old" if list(library) == NAMES["old"] else "new"
    assert list(library) == NAMES[kind], list(library)
    expected = [f"experts/{name}/{file}" for name in library for file in ("adapter_config.json", WEIGHTS)]
    assert sorted(files) == sorted(["README.md", "library.json", *expected]), files
    marks = set()
    for number, adapter in enumerate(library.values()):
        assert adapter.config["r"] == RANKS[kind]
        adapter.tensors.path()  # compares the sha256
        factors = dict(adapter.tensors.items())
        assert {min(factor.shape) for factor in factors.values()} == {RANKS[kind]}
        marks |= {float(factor[index, index]) - number / 64 for factor in factors.values() for index in (0, -1)}
    assert len(marks) == 1, marks
    return kind, int(marks.pop())


def forked(operation: Callable[[], object]) -> int:
    """Start an operation in a child process."""
    child = os.fork()
    if child:
        return child
    try:
        operation()
        os._exit(0)
    except BaseException:  # noqa: BLE001  (a child never returns)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def finish(operation: Callable[[], object]) -> float:
    """Let an operation end in a child, well; the seconds it took."""
    start = time.monotonic()
    _, status = os.waitpid(forked(operation), 0)
    assert status == 0, "the operation failed"
    return time.monotonic() - start


def kill_after(operation: Callable[[], object], seconds: float = 0.0, when: Callable[[], bool] | None = None) -> bool:
    """Start an operation and kill it after so many seconds or when something is true; whether it was running."""
    child = forked(operation)
    time.sleep(seconds)
    deadline = time.monotonic() + 30
    while when is not None and not when():
        assert time.monotonic() < deadline, "the moment to kill it did not come"
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or status == 0, "the operation failed"
    return os.WIFSIGNALED(status)


def drafts(folder: Path) -> list[Path]:
    """What killed runs left."""
    return [path for path in folder.iterdir() if ".draft-" in path.name]


class Moments:
    """Random moments in an operation whose length is measured, the same in every run."""

    def __init__(self, operation: Callable[[int], object], seed: int):
        self.length = min(finish(lambda number=number: operation(number)) for number in range(3))
        self.random = random.Random(seed)
        self.hits = 0

    def kill(self, operation: Callable[[], object]):
        """Kill an operation at the next moment; one that was over says that it takes less than was measured."""
        hit = kill_after(operation, self.random.uniform(0.0, 0.95) * self.length)
        self.hits += hit
        self.length *= 1.0 if hit else 0.8

    def report(self, what: str):
        """Say how many kills hit a running operation; most must."""
        print(f"{what}: {self.hits} of {KILLS} kills hit, of {self.length:.2f} s")
        assert self.hits >= FEWEST


def check_save(hub: Hub, work: Path):
    """A folder is absent, or the old or the new library."""
    target = work / "saves" / "lib"
    libraries = {kind: make(kind, mark, layers=32) for mark, kind in enumerate(NAMES, 1)}
    moments = Moments(lambda number: libraries["new"].save_pretrained(target), seed=1)
    for attempt in range(KILLS):
        if attempt < 5:
            shutil.rmtree(target, ignore_errors=True)
        before = inspect_folder(target)
        wanted = "new" if before == ("old", 1) else "old"
        moments.kill(lambda wanted=wanted: libraries[wanted].save_pretrained(target))
        assert inspect_folder(target) in (before, (wanted, list(NAMES).index(wanted) + 1))
        assert len(drafts(target.parent)) <= 1
    moments.report("save")
    finish(lambda: libraries["old"].save_pretrained(target))
    assert inspect_folder(target) == ("old", 1) and not drafts(target.parent)


def inspect_folder(folder: Path) -> tuple[str, int] | None:
    """What a folder holds, which is a whole library; None: there is no such folder."""
    if not folder.exists():
        return None
    return inspect(AdapterLibrary.from_pretrained(folder), list(files_of(folder)))


def inspect_repo(repo_id: str, cache: Path) -> tuple[str, int]:
    """What a repository holds, which is a whole library."""
    commit = API.model_info(repo_id).sha
    files = [path for path in API.list_repo_files(repo_id, revision=commit) if path != ".gitattributes"]
    return inspect(AdapterLibrary.from_pretrained(f"{repo_id}@{commit}", cache_dir=str(cache)), files)


def check_pull(hub: Hub, work: Path):
    """The same for a pull with an empty cache, and the next run finishes it."""
    target, cache = work / "pulls" / "lib", work / "pulls" / "cache"
    for mark, kind in enumerate(NAMES, 1):
        make(kind, mark).push_to_hub(f"alice/{kind}")

    def pull(kind: str):
        AdapterLibrary.from_pretrained(f"alice/{kind}", cache_dir=str(cache)).save_pretrained(target)

    def pull_anew(kind: str):
        shutil.rmtree(cache, ignore_errors=True)
        pull(kind)

    moments = Moments(lambda number: pull_anew("new"), seed=2)
    for attempt in range(KILLS):
        if attempt < 5:
            shutil.rmtree(target, ignore_errors=True)
        before = inspect_folder(target)
        wanted = "new" if before == ("old", 1) else "old"
        shutil.rmtree(cache, ignore_errors=True)
        moments.kill(lambda wanted=wanted: pull(wanted))
        done = wanted, list(NAMES).index(wanted) + 1
        assert inspect_folder(target) in (before, done)
        if attempt % 2:
            finish(lambda wanted=wanted: pull(wanted))
            assert inspect_folder(target) == done and not drafts(target.parent)
    moments.report("pull")


def check_push(hub: Hub, work: Path):
    """The newest commit of a repository is the old or the new library, whole."""
    repo_id, before = "alice/pushes", ("old", 100)
    make(*before).push_to_hub(repo_id)
    # of other values at each attempt, or the weights would not be sent again
    moments = Moments(lambda number: make("new", 1000 + number).push_to_hub("alice/x"), seed=3)
    for attempt in range(KILLS):
        kind, head = "old" if before[0] == "new" else "new", API.model_info(repo_id).sha
        done = kind, 101 + attempt
        moments.kill(lambda done=done: make(*done).push_to_hub(repo_id))
        after = inspect_repo(repo_id, work / "cache")
        assert after == (before if API.model_info(repo_id).sha == head else done)
        assert after in (before, done)
        if attempt % 4 == 3:
            finish(lambda done=done: make(*done).push_to_hub(repo_id))
            after = inspect_repo(repo_id, work / "cache")
            assert after == done
        before = after
    moments.report("push")


def check_a_pull_goes_on(hub: Hub, work: Path):
    """The second run downloads what the first one had not, and nothing else."""
    target, cache = work / "half" / "lib", str(work / "half" / "cache")
    make("old", 1).push_to_hub("alice/late")

    def pull():
        AdapterLibrary.from_pretrained("alice/late", cache_dir=cache).save_pretrained(target)

    def fetched(start: int = 0) -> list[str]:
        lines = [line for line in hub.log()[start:] if line["method"] == "GET" and line["path"].endswith(WEIGHTS)]
        return sorted(line["path"].split("/")[-2] for line in lines)

    start, late = len(hub.log()), NAMES["old"][3:5]
    for name in late:
        hub.delay(f"*/{name}/{WEIGHTS}", 3, "GET")

    def is_half_way() -> bool:
        is_there = len(list(Path(cache).glob(f"models--*/snapshots/*/experts/*/{WEIGHTS}"))) == 6
        return is_there and all(fault["hits"] for fault in hub.faults_ordered())

    assert kill_after(pull, when=is_half_way)
    assert not target.exists() and fetched(start) == sorted(set(NAMES["old"]) - set(late))
    hub.clear_faults()
    while len(fetched(start)) < 8:  # the late answers, for which nobody waits any more
        time.sleep(0.1)
    start = len(hub.log())
    finish(pull)
    assert inspect_folder(target) == ("old", 1) and fetched(start) == late and not drafts(target.parent)


def check_a_push_goes_on(hub: Hub, work: Path):
    """The second run uploads what the first one had not, and nothing else."""
    library = make("old", 5000)

    def uploads(start: int) -> int:
        return sum(line.startswith("PUT /_lfs/") for line in hub.requests()[start:])

    hub.delay("*/commit/*", 1.5)
    start = len(hub.requests())
    assert kill_after(
        lambda: library.push_to_hub("alice/half"),
        when=lambda: any("/commit/" in line for line in hub.requests()[start:]),
    )
    assert uploads(start) == 8
    start = len(hub.requests())
    finish(lambda: library.push_to_hub("alice/half"))
    assert uploads(start) == 0 and len(AdapterLibrary.from_pretrained("alice/half")) == 8


def main(work: str, only: str = ""):
    """Run all checks."""
    # no thread of this process that a fork would lack, and no lock of all processes that a killed one would keep
    tqdm.tqdm.monitor_interval = 0
    tqdm.tqdm.set_lock(threading.RLock())
    run_checks(globals(), Hub(os.environ["HF_ENDPOINT"]), Path(work), only=only)


if __name__ == "__main__":
    main(*sys.argv[1:])
