"""One plain PEFT LoRA per task, trained with TRL in up to two processes; what is complete is not trained again."""

import hashlib
import json
import multiprocessing
import queue
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, set_seed

from ..library.folders import new_folder
from .base import load_base, silence_known_warnings, smollm2_folder
from .task_list import load_tasks
from .tasks import MAX_TOKENS, Task


STAMP = "quickstart.json"


@dataclass(frozen=True)
class TrainSettings:
    """How every adapter is trained; `base` None is SmolLM2. The same seed gives all adapters the same first A."""

    base: str | None = None
    steps: int = 24
    batch_size: int = 8
    learning_rate: float = 2e-3
    rank: int = 8
    alpha: int = 16
    rows: int = 240
    seed: int = 0

    def fingerprint(self, task: Task) -> str:
        """Changes with the settings and with the training rows of `task`."""
        rows = [(row.prompt, row.completion) for row in task.train_rows(self.rows)]
        return hashlib.sha256(json.dumps([asdict(self), rows]).encode()).hexdigest()[:16]


def is_trained(folder: Path, fingerprint: str) -> bool:
    """Whether `folder` holds a complete adapter that was trained with these settings on these rows."""
    stamp = folder / STAMP
    return stamp.exists() and json.loads(stamp.read_text())["fingerprint"] == fingerprint


def train_adapters(
    tasks: Sequence[Task], root: Path, settings: TrainSettings, workers: int = 2, train: Callable | None = None
) -> dict[str, Path]:
    """Train the adapters that are missing in `root`; returns the folder of each task.

    Args:
        tasks (`Sequence[Task]`): tasks of `load_tasks()`.
        root (`Path`): the parent of the adapter folders.
        settings (`TrainSettings`): the same for all tasks.
        workers (`int`): processes of one thread each; 1 trains in this process.
        train (`Callable`, *optional*): `(task, folder, settings, on_step)`; default: TRL on the base of the settings.
    """
    folders = {task.name: root / task.name for task in tasks}
    missing = [task for task in tasks if not is_trained(folders[task.name], settings.fingerprint(task))]
    done = len(tasks) - len(missing)
    bar = tqdm(total=settings.steps * len(tasks), initial=settings.steps * done, desc="training", unit="step")
    with bar:
        if min(workers, len(missing)) > 1:
            _train_in_processes(missing, folders, settings, workers, bar)
        else:
            train = train or (LoraTrainer(settings.base) if missing else None)
            for task in missing:
                bar.set_postfix_str(task.name)
                train_and_stamp(train, task, folders[task.name], settings, bar.update)
    return folders


def train_and_stamp(train: Callable, task: Task, target: Path, settings: TrainSettings, on_step: Callable) -> None:
    """Train into a temporary folder that becomes `target` when it is complete."""
    with new_folder(target) as folder:
        train(task, folder, settings, on_step)
        (folder / STAMP).write_text(json.dumps({"fingerprint": settings.fingerprint(task), **asdict(settings)}))


class LoraTrainer:
    """Trains one LoRA after another on one base model, on completions only."""

    def __init__(self, base: str | None) -> None:
        self.model, self.tokenizer = load_base(base)

    def __call__(self, task: Task, folder: Path, settings: TrainSettings, on_step: Callable[[int], None]) -> None:
        """Train the adapter of `task` and save it to `folder`; `on_step(1)` is called after each optimizer step."""
        from datasets import Dataset, disable_progress_bars
        from trl import SFTConfig, SFTTrainer

        disable_progress_bars()
        rows = [{"prompt": row.prompt, "completion": row.completion} for row in task.train_rows(settings.rows)]
        with tempfile.TemporaryDirectory() as scratch:
            arguments = SFTConfig(
                output_dir=scratch,
                max_steps=settings.steps,
                per_device_train_batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
                max_length=2 * MAX_TOKENS,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                seed=settings.seed,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            set_seed(settings.seed)
            lora = LoraConfig(
                r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
            )
            trainer = SFTTrainer(
                model=self.model,
                args=arguments,
                train_dataset=Dataset.from_list(rows),
                processing_class=self.tokenizer,
                peft_config=lora,
                callbacks=[StepCallback(on_step)],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            trainer.model.save_pretrained(folder, save_embedding_layers=False)  # "auto" asks the Hub for the base
            self.model = trainer.model.unload()


class StepCallback(TrainerCallback):
    """Reports each optimizer step."""

    def __init__(self, on_step: Callable[[int], None]) -> None:
        self.on_step = on_step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.on_step(1)


def _train_in_processes(
    tasks: Sequence[Task], folders: Mapping[str, Path], settings: TrainSettings, workers: int, bar: tqdm
) -> None:
    if settings.base is None:
        smollm2_folder()  # so that the workers do not convert it twice
    context = multiprocessing.get_context("spawn")
    steps = context.Queue()
    with ProcessPoolExecutor(workers, context, _start_worker, (settings.base, steps)) as pool:
        futures = [pool.submit(_train_in_worker, task.name, folders[task.name], settings) for task in tasks]
        waiting = set(futures)
        while waiting:
            try:
                bar.update(steps.get(timeout=0.5))
            except queue.Empty:
                finished = {future for future in waiting if future.done()}
                for future in as_completed(finished):
                    future.result()
                waiting -= finished


_worker: dict = {}


def _start_worker(base: str | None, steps: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    silence_known_warnings()
    _worker["train"], _worker["on_step"] = LoraTrainer(base), steps.put


def _train_in_worker(name: str, folder: Path, settings: TrainSettings) -> None:
    (task,) = load_tasks([name])
    train_and_stamp(_worker["train"], task, folder, settings, _worker["on_step"])
