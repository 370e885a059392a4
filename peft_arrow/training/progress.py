"""One bar for the optimizer steps of a stage, whichever process makes them; only the main process prints."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tqdm import tqdm
from trl import SFTConfig

from .processes import Processes


# Seconds between two looks at what the other processes did.
INTERVAL = 0.5
NOTE = ".progress-"


def planned_steps(arguments: SFTConfig, rows: int) -> int:
    """The optimizer steps that a trainer will make on so many rows: `max_steps`, or the epochs."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    rows_a_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return math.ceil(arguments.num_train_epochs * math.ceil(rows / rows_a_step))


class Reporter:
    """What one process of a stage did: its steps, what it trains now, a line for each expert that it ended.

    The main process has the bar. The others leave a note in the stage's folder, and a thread of the main process adds
    them to the bar and prints their lines, so that no two processes write to one terminal.
    """

    def __init__(self, folder: Path, processes: Processes, bar: tqdm | None) -> None:
        self._folder, self._bar = folder, bar
        self._own = processes.state.process_index
        self._leaves_notes = processes.count > 1 and not processes.together and not processes.is_main
        self._ended, self._now, self._step, self._lines, self._left = 0, "", 0, [], 0.0
        self._printed: dict[str, int] = {}
        self._shown: tuple[str, int] = ("", 0)

    def begin(self, name: str) -> Callable[[int, int], None]:
        """An expert begins; returns what is to be called with (step, all steps)."""
        self._now, self._step = name, 0

        def on_step(step: int, steps: int) -> None:
            self._step = step
            self._leave(hurry=False)

        return on_step

    def end(self, line: str) -> None:
        """The expert ended, as the line tells."""
        self._ended, self._now, self._step = self._ended + self._step, "", 0
        self._lines.append(line)
        self._leave(hurry=True)

    def show(self) -> None:
        """Draw what all processes have done until now, and print the lines that are new."""
        if self._bar is None:
            return
        notes = [self._note(), *filter(None, map(_read, sorted(self._folder.glob(f"{NOTE}*"))))]
        for note in notes:
            printed = self._printed.get(note["process"], 0)
            for line in note["lines"][printed:]:
                tqdm.write(line, file=sys.stderr)
            self._printed[note["process"]] = len(note["lines"])
        now, steps = ", ".join(note["now"] for note in notes if note["now"]), sum(note["steps"] for note in notes)
        changed = (now, steps) != self._shown
        if changed or sys.stderr.isatty():  # where nobody looks, a line for each change is enough
            self._shown, self._bar.n = (now, steps), steps
            self._bar.set_postfix_str(now)

    def _note(self) -> dict:
        steps = self._ended + self._step
        return {"process": str(self._own), "steps": steps, "now": self._now, "lines": list(self._lines)}

    def _leave(self, hurry: bool) -> None:
        if self._leaves_notes and (hurry or time.monotonic() > self._left + INTERVAL):
            self._left = time.monotonic()
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"{NOTE}{self._own}").write_text(json.dumps(self._note()), encoding="utf-8")


def _read(path: Path) -> dict | None:
    """A note; None where its process is writing it at this moment."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def forget_notes(folder: Path) -> None:
    """Remove the notes of a stage."""
    for path in folder.glob(f"{NOTE}*"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def reporting(
    title: str, folder: Path, steps: Mapping[str, int], processes: Processes, shown: bool
) -> Iterator[Reporter]:
    """A bar over the steps of the experts of all processes; where nothing is to be trained, a line that says so.

    Args:
        title (`str`): of the bar.
        folder (`Path`): of the stage.
        steps (`Mapping[str, int]`): expert that is to be trained -> its steps.
        processes (`Processes`): of the launch.
        shown (`bool`): whether the user wants to see it.
    """
    shown = shown and processes.is_main
    if not (shown and steps):
        if shown:
            tqdm.write(title, file=sys.stderr)
        yield Reporter(folder, processes, None)
        return
    stopped = threading.Event()
    with tqdm(desc=title, total=sum(steps.values()), unit="step") as bar:
        reporter = Reporter(folder, processes, bar)

        def watch() -> None:
            while not stopped.wait(INTERVAL):
                reporter.show()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield reporter
        finally:
            stopped.set()
            thread.join()
            reporter.show()
