"""`adapt`: one adapter of a new task, from a library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel

from ..evaluation.fingerprints import library_fingerprint
from ..library.adapter import AdapterRef, check_name, slug
from ..library.base_names import check_base
from ..library.library import AdapterLibrary
from ..training.adapter import train_adapter
from ..training.data import read_examples
from ..training.jobs import Job, Plan, finished, moved, plan_job, train_job
from ..training.optimizers import two_rates
from ..training.reading import DatasetLike
from ..training.recipe import LORA_RECIPE
from ..training.setup import Setup, set_up
from .methods import METHODS, Method, Task
from .mixtures import is_logits, mix_experts, settle
from .searching import search_weights
from .starts import AGGREGATIONS, open_experts, set_factors


DEFAULTS = {"aggregation": "parameter", "top_k": 4, "rows": 64, "evaluations": 30}


def adapt(
    base: PreTrainedModel | str | PathLike,
    library: Any,
    dataset: DatasetLike,
    *,
    method: str = "mean",
    output_dir: str | PathLike,
    name: str | None = None,
    steps: int | None = None,
    **options: Any,
) -> AdapterRef:
    """Adapt a library to one task; the result is a plain PEFT LoRA, whatever the method (arXiv 2405.11157, 4.3).

    Args:
        base (`PreTrainedModel` or `str`): the base model, its Hub id or its folder; a model is given back as it was.
        library: what makes an `AdapterLibrary`; None for `"scratch"`.
        dataset: the task's rows, in any form of `read_examples`.
        method (`str`): a key of `METHODS`, which says what each does.
        output_dir (`str` or `PathLike`): the adapter's folder; it appears when the adapter is complete.
        name (`str`, *optional*): of the task; by default that of the folder.
        steps (`int`, *optional*): optimizer steps, in the place of epochs.
        options: of `train_adapter`; from a library come rank, alpha and modules, so that `lora_config` may then hold
            `lora_dropout` alone. And of the methods:
            `aggregation`: how `"mean"` and `"arrow"` add experts up, see [`mixed`]; default `"parameter"`;
            `top_k`: experts a token of `"arrow"`, 4; `rows`: that `"arrow"` routes and `"lorahub"` scores at each
            evaluation, 64; `evaluations`: of `"lorahub"`, 30.

    Returns:
        `AdapterRef`: the folder. One that is there already, made in the same way, is not made again.

    Raises:
        ValueError: an argument, row or expert is not allowed, or the folder holds something else.
        ImportError: nevergrad is missing, for `"lorahub"`.
        NotFinite: the loss became NaN or infinite.
    """
    chosen = _method(method)
    settings = _settings(method, chosen, {key: options.pop(key) for key in DEFAULTS if key in options})
    if not chosen.needs_library:
        return train_adapter(base, dataset, output_dir=output_dir, name=name, steps=steps, **options)
    dropout = _dropout(method, options.pop("lora_config", None))
    folder, setup = Path(output_dir).expanduser(), set_up(base, **options)
    if setup.processes.together:
        raise ValueError(f"method={method!r} cannot be trained under FSDP or DeepSpeed; launch without them.")
    found = _library(library, setup, method)
    experts = open_experts(list(found.values()))
    examples = read_examples(check_name(name) if name is not None else slug(folder.name), dataset)
    job = _plan(setup, experts.lora_config(dropout), examples, folder, steps)
    told = {"method": method, "library": library_fingerprint(found), **settings}
    job = replace(job, identity={**job.identity, **{f"adapt.{key}": value for key, value in told.items()}})
    return _run(setup, chosen, Task(setup.base, examples, experts, {**DEFAULTS, **settings}), job)


def _run(setup: Setup, method: Method, task: Task, job: Job) -> AdapterRef:
    processes = setup.processes
    if processes.from_main(finished(job, setup.plan.overwrite) is None):
        with tqdm(desc=job.name, unit="step", disable=not (setup.progress and processes.is_main)) as bar:
            for _ in processes.mine([job.name]):
                if method.is_searched:
                    search_weights(task, job, setup.plan, moved(bar))
                else:
                    train_job(setup.base, _started(method, task, job), setup.plan, processes, moved(bar))
        processes.gather([])
    return AdapterRef(job.folder)


def _started(method: Method, task: Task, job: Job) -> Job:
    """The job with what happens to the fresh LoRA before training, and to the trained one before it is saved."""
    if method.start is not None:
        factors = method.start(task)
        return replace(job, more=lambda model: set_factors(model, factors) or {})
    return replace(job, more=partial(_mixed, method=method, task=task, job=job), after=settle)


def _mixed(model: PeftModel, method: Method, task: Task, job: Job) -> dict[str, Any]:
    mix_experts(model, task.experts, is_trained=method.tunes_experts)
    return {"optimizer": two_rates(model, job.arguments, is_logits)}


def _plan(setup: Setup, lora: LoraConfig, examples: Any, folder: Path, steps: int | None) -> Job:
    plan = Plan(setup.plan.sft_config, lora, setup.plan.init_seed, setup.plan.overwrite)
    return plan_job(setup.base, examples, folder, plan, steps)


def _method(name: str) -> Method:
    if name not in METHODS:
        raise ValueError(f"method={name!r} is unknown; allowed are {', '.join(map(repr, METHODS))}.")
    return METHODS[name]


def _settings(name: str, method: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    """The method's own options, those that were not given at their defaults."""
    for key, value in given.items():
        if key not in method.options:
            allowed = f"it has {', '.join(method.options)}" if method.options else "it has no options"
            raise ValueError(f"{key}={value!r} is not for method={name!r}; {allowed}.")
        if key == "aggregation":
            if value not in AGGREGATIONS:
                raise ValueError(f"aggregation={value!r} is unknown; allowed are 'parameter' and 'output'.")
        elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key}={value!r} is not allowed; it is a whole number of at least 1.")
    return {key: given.get(key, DEFAULTS[key]) for key in method.options}


def _dropout(method: str, lora_config: Any) -> float:
    """The dropout that is asked for."""
    given = {} if lora_config is None else lora_config
    if not isinstance(given, Mapping) or set(given) - {"lora_dropout"}:
        raise ValueError(
            f"lora_config={lora_config!r} is not for method={method!r}: rank, alpha and modules are those of the "
            "library; allowed is {'lora_dropout': ...}."
        )
    return float(given.get("lora_dropout", LORA_RECIPE["lora_dropout"]))


def _library(library: Any, setup: Setup, method: str) -> AdapterLibrary:
    if library is None:
        raise ValueError(f"library is None; method={method!r} starts from a library.")
    named = setup.base.name or None
    found = library if isinstance(library, AdapterLibrary) else AdapterLibrary.from_pretrained(library, named)
    if setup.base.name:
        check_base(setup.base.name, found.values(), "base")
    if method == "shared" and len(found) != 1:
        raise ValueError(
            f"method='shared' goes on with one expert, and the library has {len(found)}; choose it with "
            "library.select([name])."
        )
    return found
