"""What each process of the quickstart's training runs: `python -m peft_arrow.quickstart.build FOLDER`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from pathlib import Path

from ..building import train_library
from ..library.library import AdapterLibrary
from ..training.errors import TASK_ERRORS
from ..training.recipe import WARMUP
from .base import load_base, silence_known_warnings
from .settings import ERROR_NAME, PLAN_NAME, BuildPlan
from .tasks import MAX_TOKENS


def build_library(plan: BuildPlan) -> AdapterLibrary:
    """Build the library of a plan; what is finished and unchanged is not trained again.

    Raises:
        TrainingFailed: some experts failed; the message names them.
    """
    settings = plan.settings
    model, tokenizer = load_base(settings.base)
    return train_library(
        model,
        plan.data,
        kind="mbc",
        output_dir=plan.output,
        n_clusters=settings.clusters,
        steps=settings.steps,
        seed=settings.seed,
        made={"command": plan.command},
        tokenizer=tokenizer,
        init_seed=settings.seed,
        overwrite=True,
        sft_config={
            "learning_rate": settings.learning_rate,
            "per_device_train_batch_size": settings.batch_size,
            "gradient_accumulation_steps": 1,
            "max_grad_norm": 1.0,
            WARMUP: 0,
            "max_length": 2 * MAX_TOKENS,
            "seed": settings.seed,
            "save_steps": 20,
        },
        lora_config={
            "r": settings.rank,
            "lora_alpha": settings.alpha,
            "lora_dropout": 0.0,
            "target_modules": "all-linear",
        },
    )


def end_with_the_caller() -> None:
    """End this process when the one that started the launch ends, however it ends: its pipe to us is closed then."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(folder: Path) -> None:
    """Build the plan in `folder`. The first process shows its progress on stdout; all else goes to stderr, a log.

    The first error of a process is left in `folder` for the caller: what the launcher tells of it is 60 lines long.
    """
    end_with_the_caller()
    silence_known_warnings()
    plan = BuildPlan.from_json(json.loads((folder / PLAN_NAME).read_text(encoding="utf-8")))
    is_shown = os.environ.get("RANK", "0") == "0"
    try:
        with contextlib.redirect_stderr(sys.stdout) if is_shown else contextlib.nullcontext():
            build_library(plan)
    except (ImportError, *TASK_ERRORS) as error:
        with contextlib.suppress(FileExistsError), (folder / ERROR_NAME).open("x", encoding="utf-8") as file:
            json.dump({"kind": type(error).__name__, "message": str(error)}, file)
        raise


if __name__ == "__main__":
    main(Path(sys.argv[1]))
