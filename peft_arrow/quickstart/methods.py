"""The compared ways of choosing adapters, each judged on every task; results are kept on disk per method."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .. import ArrowLoraModel
from .base import load_base
from .judge import PlainJudge, Score, best_single, files_fingerprint, judge_rows, use_random_routing
from .tasks import Row, Task


PLAIN = ("base", "own", "best_single", "single")
SELECTION_ROWS = 4


@dataclass(frozen=True)
class JudgeSettings:
    """How the methods are compared: held-out rows a task, experts a token, and runs of random routing."""

    heldout: int = 24
    top_k: int = 4
    seeds: int = 3

    def routed(self) -> list[str]:
        """The methods that need the routed model."""
        return ["uniform", *(f"random-{seed}" for seed in range(self.seeds)), "arrow"]


class Results:
    """The values of an earlier run that have the same fingerprint, and the ones of this run."""

    def __init__(self, folder: Path, fingerprint: str, bar: tqdm) -> None:
        self.folder, self.fingerprint, self.bar = folder, fingerprint, bar
        self.values: dict[str, Any] = {}

    def has(self, *methods: str) -> bool:
        """Whether all `methods` have a value; reads what is on disk."""
        for method in methods:
            path = self.folder / f"{method}.json"
            if method not in self.values and path.exists():
                stored = json.loads(path.read_text())
                if stored["fingerprint"] == self.fingerprint:
                    self.values[method] = stored["value"]
                    self.bar.update()
        return all(method in self.values for method in methods)

    def fill(self, method: str, compute: Callable[[], Any]) -> None:
        """Compute and store the value of `method` unless there is one."""
        if self.has(method):
            return
        self.bar.set_postfix_str(method)
        self.values[method] = compute()
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{method}.part"
        partial.write_text(json.dumps({"fingerprint": self.fingerprint, "value": self.values[method]}))
        partial.rename(self.folder / f"{method}.json")
        self.bar.update()


def judge_methods(
    tasks: Sequence[Task], folders: Mapping[str, Path], store: Path, base: str | None, settings: JudgeSettings
) -> tuple[dict[str, dict], str]:
    """Method -> task -> score of base, uniform, random-0 ..., single, Arrow and own; and the name of the best single.

    The best single adapter has the lowest mean loss over the tasks on some rows of their training sets, so that the
    held-out rows choose nothing.
    """
    heldout = {task.name: task.heldout_rows(settings.heldout) for task in tasks}
    selection = {task.name: task.train_rows(SELECTION_ROWS) for task in tasks}
    text = [[row.prompt, row.completion] for rows in (heldout, selection) for name in rows for row in rows[name]]
    fingerprint = files_fingerprint(list(folders.values()), [asdict(settings), base, text])
    with tqdm(total=len(PLAIN) + len(settings.routed()), desc="judging", unit="method") as bar:
        results = Results(store, fingerprint, bar)
        loaded = None
        if not results.has(*PLAIN):
            loaded = load_base(base)
            _judge_plain(results, PlainJudge(*loaded, folders), heldout, selection)
        if not results.has(*settings.routed()):
            _judge_routed(results, *(loaded or load_base(base)), folders, heldout, settings)
    order = ["base", *settings.routed()[:-1], "single", "arrow", "own"]
    return {method: results.values[method] for method in order}, results.values["best_single"]


def _judge_plain(
    results: Results, judge: PlainJudge, heldout: Mapping[str, Sequence[Row]], selection: Mapping[str, Sequence[Row]]
) -> None:
    results.fill("base", lambda: _scores(lambda task, rows: judge.base(rows), heldout))
    results.fill("own", lambda: _scores(judge.single, heldout))
    results.fill("best_single", lambda: best_single(judge, selection))
    best = results.values["best_single"]
    results.fill("single", lambda: _scores(lambda task, rows: judge.single(best, rows), heldout))
    judge.model.unload()


def _judge_routed(
    results: Results,
    base: Any,
    tokenizer: PreTrainedTokenizerBase,
    folders: Mapping[str, Path],
    heldout: Mapping[str, Sequence[Row]],
    settings: JudgeSettings,
) -> None:
    model = ArrowLoraModel.from_pretrained(base, adapters=dict(folders), top_k=settings.top_k)
    for method in settings.routed():
        if method.startswith("random-"):
            use_random_routing(model, settings.top_k, seed=int(method.removeprefix("random-")))
        else:
            model.set_router(method, top_k=settings.top_k)
        results.fill(method, lambda: _scores(lambda task, rows: judge_rows(model, tokenizer, rows), heldout))


def _scores(judge: Callable[[str, Sequence[Row]], Score], heldout: Mapping[str, Sequence[Row]]) -> dict[str, dict]:
    return {task: asdict(judge(task, rows)) for task, rows in heldout.items()}
