"""The work in pieces of a few minutes: what is done is marked, what is in work is locked, anything may be killed."""

from __future__ import annotations

import fcntl
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from . import adapting, analyses
from .judge import judge
from .setting import Setting
from .train import train
from .ways import has_own


WAIT = 2.0  # seconds between looks at what others are doing


@dataclass(frozen=True)
class Piece:
    """One piece of work.

    Args:
        name (`str`): of its mark and lock.
        run (`Callable`): does it, or what is left of it.
        after (`tuple[str, ...]`): pieces that have to be done before.
    """

    name: str
    run: Callable[[Setting], None]
    after: tuple[str, ...] = ()


def list_pieces(setting: Setting) -> list[Piece]:
    """All pieces, in the order that completes the tables early: wave by wave of libraries, then more of everything."""
    config, pieces, known = setting.config, [], []
    shares, groups = list(config["adapting"]["shares"]), config["judging"]["groups"]
    for wave in config["waves"]:
        known += wave
        pieces += [_training(name) for name in wave] + _judging(config, wave, "core", 0)
        pieces += _adapting(setting, shares[:1], wave)
        for group in (name for name in groups if name != "core"):
            pieces += _judging(config, wave, group, 0)
        pieces += [
            Piece(f"similarity-{name}", partial(analyses.similarity, library=name), _after(name)) for name in wave
        ]
        routed = [name for name in wave if has_own(name)]
        pieces += [Piece(f"routing-{name}", partial(analyses.routing, library=name), _after(name)) for name in routed]
    pairs = f"pairs-{setting.seed}"
    pieces += [Piece(pairs, analyses.list_pairs, _after(f"private-{setting.seed}"))]
    pieces += [
        Piece(f"pair-{setting.seed}-{number}", partial(analyses.pair, number=number), (pairs,))
        for number in range(config["analyses"]["pairs"])
    ]
    pieces += _adapting(setting, shares[1:], known)
    for number in range(1, config["judging"]["rounds"]):
        for group in groups:
            pieces += _judging(config, known, group, number)
    _check_waits(pieces)
    return pieces


def _check_waits(pieces: list[Piece]) -> None:
    """What waits for a library that is in no wave would wait for ever."""
    names = {piece.name for piece in pieces}
    for piece in pieces:
        for name in piece.after:
            if name not in names:
                library = name.removeprefix("train-")
                raise ValueError(f"{piece.name} needs the library {library}, which is in no wave of the config.")


def _training(name: str) -> Piece:
    return Piece(f"train-{name}", partial(train, name=name))


def _after(*libraries: str | None) -> tuple[str, ...]:
    return tuple(f"train-{name}" for name in libraries if name is not None)


def _judging(config: dict, libraries: list[str], group: str, number: int) -> list[Piece]:
    return [
        Piece(
            f"judge-{name}-{group}-{number}",
            partial(judge, library=name, group=group, number=number),
            _after(name),
        )
        for name in config["judging"]["groups"][group]
        if name in libraries
    ]


def _adapting(setting: Setting, shares: list[float], libraries: list[str]) -> list[Piece]:
    """Adaptation from these libraries; with the first ones come the base and what needs no library."""
    options, config = setting.config["adapting"], setting.config
    is_first, is_less = libraries[0] == config["waves"][0][0], shares == list(options["shares"])[:1]
    pieces = [Piece("adapt-base", adapting.base_losses)] if shares and is_first and is_less else []
    for share in shares:
        chosen = options["shares"][share].get("methods", options["methods"])
        for way, (_, library) in options["methods"].items():
            if way not in chosen or (library or config["waves"][0][0]) not in libraries:
                continue
            pieces += [
                Piece(
                    f"adapt-{way}-{task}-{share}-{setting.seed}",
                    partial(adapting.adapt_one, way=way, task=task, share=share),
                    _after(library),
                )
                for task in setting.suites.judged["sni"]
            ]
    return pieces


def work(setting: Setting, pieces: list[Piece], told: Callable[[str], None], until: float | None = None) -> None:
    """Do every piece that nobody else is doing, until all are done.

    Args:
        setting (`Setting`): the replication.
        pieces (`list[Piece]`): in order; other processes may work on the same list.
        told (`Callable`): is told a line for each piece.
        until (`float`, *optional*): begin no piece after this time (`time.time()`).
    """
    waited_for: list[str] = []
    while left := [piece for piece in pieces if not is_done(setting, piece.name)]:
        if until is not None and time.time() > until:
            return
        took = next((took for piece in left if (took := _do(setting, piece))), None)
        if took:
            told(f"{took}, {len(left) - 1} or fewer left")
            continue  # look from the start again: what was waited for may be ready
        before = [name for piece in left for name in piece.after if not is_done(setting, name)]
        names = list(dict.fromkeys(before or [piece.name for piece in left]))
        if names != waited_for:
            told(f"waiting until another process has done {', '.join(names)}")
        waited_for = names
        time.sleep(WAIT)


def _do(setting: Setting, piece: Piece) -> str | None:
    """Do a piece that can be done and that nobody else is doing; returns how long it took."""
    if not all(is_done(setting, name) for name in piece.after):
        return None
    with locked(setting, piece.name) as is_mine:
        if not is_mine or is_done(setting, piece.name):
            return None
        started, used = time.monotonic(), time.process_time()
        piece.run(setting)
        took = {"seconds": time.monotonic() - started, "core_seconds": time.process_time() - used}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        mark = {**{key: round(value, 1) for key, value in took.items()}, "peak_mib": round(peak)}
        setting.write(f"done/{piece.name}.json", mark)
        return f"{piece.name}: {took['seconds']:.0f} s"


def is_done(setting: Setting, name: str) -> bool:
    """Whether a piece is marked."""
    return (setting.root / "done" / f"{name}.json").exists()


@contextmanager
def locked(setting: Setting, name: str) -> Iterator[bool]:
    """Whether this process has the piece for itself; the system takes the lock back from one that dies."""
    folder = setting.root / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
