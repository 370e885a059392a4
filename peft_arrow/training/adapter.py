"""`train_adapter`: one adapter from one data set."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

from ..library.adapter import AdapterRef, check_name, slug
from .data import read_examples
from .jobs import finished, moved, plan_job, train_job
from .reading import DatasetLike
from .setup import set_up


def train_adapter(
    base: PreTrainedModel | str | PathLike,
    dataset: DatasetLike,
    *,
    output_dir: str | PathLike,
    name: str | None = None,
    steps: int | None = None,
    **training: Any,
) -> AdapterRef:
    """Train one LoRA on one dataset with TRL's SFTTrainer, on completions only.

    Without configs it is the recipe of arXiv 2405.11157: rank 4, alpha 16, dropout 0.05 on the attention projections,
    AdamW at 1e-4 with 6 % warm-up and linear decay, 16 rows a step, gradients clipped at 0.1, five epochs.

    Args:
        base (`PreTrainedModel` or `str`): the base model, its Hub id or its folder; a model is given back as it was.
        dataset: a `Dataset`, a Hub id, a file or folder, or a list of rows; see `read_examples` for the columns.
        output_dir (`str` or `PathLike`): the adapter's folder; it appears when the adapter is complete.
        name (`str`, *optional*): of the task; by default that of the folder.
        steps (`int`, *optional*): optimizer steps, in the place of epochs.
        sft_config (`SFTConfig` or `Mapping`, *optional*): a mapping changes fields of the recipe, a config all.
        lora_config (`LoraConfig` or `Mapping`, *optional*): in the same way.
        init_seed (`int`): of A; the same for adapters that are to share it. The global random states are kept.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): by default that of the base's name.
        base_model_kwargs (`Mapping`, *optional*): for loading the base: `dtype`, `device_map`, `revision` ...
        overwrite (`bool`): train again where data or configs changed since; otherwise that is an error.
        progress (`bool`): show a bar.

    Returns:
        `AdapterRef`: the folder. An adapter that is already there, trained in the same way, is not trained again.

    Raises:
        ValueError: bad rows or configs, or the folder holds something else; nothing is loaded or written then.
        NotFinite: the loss or the gradient became NaN or infinite; the folder is not made.
    """
    folder, setup = Path(output_dir).expanduser(), set_up(base, **training)
    processes = setup.processes
    examples = read_examples(check_name(name) if name is not None else slug(folder.name), dataset)
    job = plan_job(setup.base, examples, folder, setup.plan, steps)
    if processes.from_main(finished(job, setup.plan.overwrite) is None):
        with tqdm(desc=job.name, unit="step", disable=not (setup.progress and processes.is_main)) as bar:
            for _ in processes.mine([job.name]):
                train_job(setup.base, job, setup.plan, processes, moved(bar))
        processes.gather([])
    return AdapterRef(folder)
