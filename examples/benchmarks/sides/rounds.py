"""Sides in turn, round after round; medians, and medians of the ratios of each round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field


@dataclass
class Times:
    """Seconds of each side, one entry a round.

    Args:
        seconds (`dict[str, list[float]]`): by side; one entry only for a side that is slow.
        once (`set[str]`): the sides that were too slow to be repeated.
        absent (`dict[str, str]`): sides that were not run, with the reason.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    once: set[str] = field(default_factory=set)
    absent: dict[str, str] = field(default_factory=dict)

    def median(self, name: str) -> float | None:
        """Seconds; None for a side that was not run."""
        return statistics.median(self.seconds[name]) if self.seconds.get(name) else None

    def ratio(self, name: str, other: str) -> float | None:
        """The median over rounds of `name` / `other`; where one ran once, of its time to the other's median."""
        if not self.seconds.get(name) or not self.seconds.get(other):
            return None
        if name in self.once or other in self.once:
            return self.median(name) / self.median(other)
        return statistics.median(a / b for a, b in zip(self.seconds[name], self.seconds[other], strict=True))


def failure(error: Exception) -> str:
    """How running out of memory is reported.

    Raises:
        Exception: the error, where it is another one.
    """
    if "out of memory" in str(error) or "allocate memory" in str(error):
        return f"out of memory: {str(error).splitlines()[0]}"
    raise error


def in_turn(calls: Mapping[str, Callable[[], float]], repeats: int, slow: float) -> Times:
    """Time every call once to warm up, then all of them in turn, `repeats` times.

    Args:
        calls (`Mapping[str, Callable[[], float]]`): each returns its seconds.
        repeats (`int`): rounds.
        slow (`float`): a side whose first call takes more seconds is not repeated.
    """
    times = Times()
    for name, call in calls.items():
        try:
            first = call()
        except RuntimeError as error:
            times.absent[name] = failure(error)
            continue
        times.seconds[name] = [first] if first > slow else []
        if first > slow:
            times.once.add(name)
    for _ in range(repeats):
        for name in times.seconds:
            if name not in times.once:
                times.seconds[name].append(calls[name]())
    return times


def blocks_in_turn(starts: Mapping[str, Callable[[], Iterator[float]]], repeats: int, slow: float) -> Times:
    """As `in_turn` for work that is done in blocks, such as decoding: the sides take turns block by block.

    Args:
        starts (`Mapping[str, Callable[[], Iterator[float]]]`): each begins the work anew and yields each block's
            seconds.
        repeats (`int`): how often the work is done.
        slow (`float`): a side whose first block takes more seconds is not continued.
    """
    times = in_turn({name: lambda start=start: next(start()) for name, start in starts.items()}, 0, slow)
    for _ in range(repeats):
        running = {name: starts[name]() for name in times.seconds if name not in times.once}
        while running:
            done = []
            for name, blocks in running.items():
                seconds = next(blocks, None)
                if seconds is None:
                    done.append(name)
                else:
                    times.seconds[name].append(seconds)
            assert len(done) in (0, len(running)), "all sides have equally many blocks"
            running = {} if done else running
    return times
