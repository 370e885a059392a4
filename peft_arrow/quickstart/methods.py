"""The compared ways of choosing adapters, each judged on every task; results are kept on disk per method."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import ArrowLoraModel
from .judge import PlainJudge, Score, best_single, files_fingerprint, judge_rows
from .settings import Trained
from .tasks import Row, Task


PLAIN = ("base", "best_single", "single", "own_cluster", "own_private")
PRIVATE = ("arrow_private", "private_calibrated")
CALIBRATED = ("arrow_calibrated", "private_calibrated")
SELECTION_ROWS = 4
Loaded = Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


@dataclass(frozen=True)
class JudgeSettings:
    """How the methods are compared: held-out rows a task, experts a token (of four), and runs of random routing."""

    heldout: int = 24
    top_k: int = 2
    seeds: int = 3

    def routed(self) -> list[str]:
        """The methods that need the routed model of the library."""
        return ["uniform", *(f"random-{seed}" for seed in range(self.seeds)), "arrow", "arrow_calibrated"]


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
    tasks: Sequence[Task], trained: Trained, store: Path, loaded: Loaded, settings: JudgeSettings, base: str | None
) -> tuple[dict[str, dict], str]:
    """Method -> task -> score, and the name of the best single expert.

    The methods are base; uniform, random-0 ..., single and Arrow over the clusters' experts; Arrow over the private
    adapters, both also calibrated; and each task with the expert of its cluster, and with its own private adapter. The
    best single expert has the lowest mean loss over the tasks on some rows of their training sets: the held-out rows
    choose nothing.

    Args:
        tasks (`Sequence[Task]`): the tasks.
        trained (`Trained`): the library, its clusters and the private adapters.
        store (`Path`): the folder of the results; those of the same adapters, rows and settings are used again.
        loaded (`Callable`): gives base and tokenizer; called only where something is not judged yet.
        settings (`JudgeSettings`): how the methods are compared.
        base (`str`, *optional*): the name of the base.
    """
    heldout = {task.name: task.heldout_rows(settings.heldout) for task in tasks}
    selection = {task.name: task.train_rows(SELECTION_ROWS) for task in tasks}
    text = [[row.prompt, row.completion] for rows in (heldout, selection) for name in rows for row in rows[name]]
    folders = trained.experts | trained.private
    fingerprint = files_fingerprint(list(folders.values()), [asdict(settings), base, trained.groups, text])
    with tqdm(total=len(PLAIN) + len(settings.routed()) + len(PRIVATE), desc="judging", unit="method") as bar:
        results = Results(store, fingerprint, bar)
        if not results.has(*PLAIN):
            _judge_plain(results, PlainJudge(*loaded(), folders), trained, heldout, selection)
        if not results.has(*settings.routed()):
            _judge_routed(results, loaded, str(trained.library), settings.routed(), heldout, settings)
        if not results.has(*PRIVATE):
            _judge_routed(results, loaded, trained.private, PRIVATE, heldout, settings)
    order = [
        "base",
        *settings.routed()[:-2],
        "single",
        *settings.routed()[-2:],
        *PRIVATE,
        "own_cluster",
        "own_private",
    ]
    return {method: results.values[method] for method in order}, results.values["best_single"]


def _judge_plain(
    results: Results,
    judge: PlainJudge,
    trained: Trained,
    heldout: Mapping[str, Sequence[Row]],
    selection: Mapping[str, Sequence[Row]],
) -> None:
    results.fill("base", lambda: _scores(lambda task, rows: judge.base(rows), heldout))
    results.fill("own_private", lambda: _scores(judge.single, heldout))
    results.fill(
        "own_cluster", lambda: _scores(lambda task, rows: judge.single(trained.cluster_of(task), rows), heldout)
    )
    results.fill("best_single", lambda: best_single(judge, list(trained.experts), selection))
    best = results.values["best_single"]
    results.fill("single", lambda: _scores(lambda task, rows: judge.single(best, rows), heldout))
    judge.model.unload()


def _judge_routed(
    results: Results,
    loaded: Loaded,
    adapters: str | Mapping[str, Path],
    methods: Sequence[str],
    heldout: Mapping[str, Sequence[Row]],
    settings: JudgeSettings,
) -> None:
    base, tokenizer = loaded()
    model = ArrowLoraModel.from_pretrained(base, adapters, top_k=settings.top_k)
    for method in methods:
        if method.startswith("random-"):
            model.set_router("random", top_k=settings.top_k, seed=int(method.removeprefix("random-")))
        else:
            model.set_router("uniform" if method == "uniform" else "arrow", top_k=settings.top_k)
        if method in CALIBRATED and not results.has(method):
            model.calibrate_router()
        results.fill(method, lambda: _scores(lambda task, rows: judge_rows(model, tokenizer, rows), heldout))
    model.unload()


def _scores(judge: Callable[[str, Sequence[Row]], Score], heldout: Mapping[str, Sequence[Row]]) -> dict[str, dict]:
    return {task: asdict(judge(task, rows)) for task, rows in heldout.items()}
