"""Adapters that cannot be used, and what the error must say of each."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from .adapters import adapter, edit_config, edit_tensors
from .bases import gpt2, llama


def rename_first(tensors, new: str) -> None:
    tensors[new] = tensors.pop(next(iter(tensors)))


def fill_first(value: float):
    return lambda tensors: tensors[next(iter(tensors))].fill_(value)


def drop(part: str):
    def edit(tensors):
        del tensors[next(key for key in tensors if part in key)]

    return edit


def drop_module(tensors) -> None:
    for key in [key for key in tensors if "layers.0.self_attn.q_proj" in key]:
        del tensors[key]


def add_tensor(name: str):
    return lambda tensors: tensors.update({name: torch.ones(4, 4)})


def zero(tensors) -> None:
    for tensor in tensors.values():
        tensor.zero_()


def misshape(tensors) -> None:
    key = next(key for key in tensors if "lora_A" in key)
    tensors[key] = tensors[key][:2].clone()


# what is wrong with the file -> (how, what the message must say)
DAMAGED = {
    "A missing": (drop("lora_A"), r"tensor model\.layers\.0\..*lora_A.weight is missing"),
    "B missing": (drop("lora_B"), r"tensor model\.layers\.0\..*lora_B.weight is missing"),
    "module missing": (drop_module, r"config targets 'model.layers.0.self_attn.q_proj', but the file has no tensors"),
    "extra tensor": (
        add_tensor("base_model.model.extra"),
        r"neither LoRA factors nor listed.*base_model\.model\.extra",
    ),
    "extra module": (
        lambda tensors: tensors.update(
            {
                f"base_model.model.model.layers.0.self_attn.k_proj.lora_{h}.weight": torch.ones(s)
                for h, s in (("A", (4, 32)), ("B", (16, 4)))
            }
        ),
        r"file has tensors for 'model.layers.0.self_attn.k_proj', which its config does not target",
    ),
    "renamed": (
        lambda tensors: rename_first(tensors, "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"),
        "(missing|no module)",
    ),
    "NaN": (fill_first(float("nan")), r"model\.layers\.0\.self_attn\.q_proj\.lora_A holds NaN, Inf"),
    "Inf": (fill_first(float("inf")), r"model\.layers\.0\.self_attn\.q_proj\.lora_A holds NaN, Inf"),
    "all zero": (zero, "the whole update is zero"),
    "rank of the file": (misshape, r"lora_A of shape \(2, 32\).*config says rank 4"),
}


def damaged(folder, kind: str) -> str:
    adapter(folder, r=4)
    edit_tensors(str(folder), DAMAGED[kind][0])
    return str(folder)


def pickled(folder) -> str:
    """A folder as old PEFT wrote it: the weights in a pickle."""
    path = Path(adapter(folder, r=4))
    torch.save(load_file(path / "adapter_model.safetensors"), path / "adapter_model.bin")
    (path / "adapter_model.safetensors").unlink()
    return str(path)


def truncated(folder) -> str:
    path = Path(adapter(folder, r=4)) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    return str(folder)


def empty_folder(folder) -> str:
    Path(folder).mkdir()
    return str(folder)


def broken_config(folder) -> str:
    (Path(adapter(folder, r=4)) / "adapter_config.json").write_text("{not json")
    return str(folder)


def changed_config(folder, **values) -> str:
    edit_config(adapter(folder, r=4), **values)
    return str(folder)


# a field of adapter_config.json -> values that it cannot have
BAD_VALUES = {
    "r": (0, -1, "x", 2.5),
    "lora_alpha": (0, "x", float("nan")),
    "lora_dropout": ("x", 1.5),
    "target_modules": (5, "("),
    "exclude_modules": (7,),
    "modules_to_save": ("lm_head",),
    "layers_to_transform": ("x",),
    "rank_pattern": ([1], {"(": 4}),
    "use_rslora": ("yes",),
}


def _config_case(key: str, value):
    """An error that names the adapter and shows the value."""
    shown = "'\\('" if "(" in str(value) else re.escape(repr(value))
    return lambda folder: changed_config(folder, **{key: value}), rf"its config.*{shown}"


# an adapter that cannot be used -> (how it is made in a folder, what the message must say)
UNUSABLE = {
    **{kind: (lambda folder, kind=kind: damaged(folder, kind), message) for kind, (_, message) in DAMAGED.items()},
    "another base": (
        lambda folder: adapter(folder, gpt2, target_modules=["c_attn"], fan_in_fan_out=True),
        r"base model has no module 'transformer\.h\.0\.attn\.c_attn'.*another base\?",
    ),
    "another width": (
        lambda folder: adapter(folder, lambda: llama(hidden_size=64)),
        r"q_proj maps 64 to 64 features in the adapter, 32 to 32 in the base model; is the adapter for another base\?",
    ),
    "pickle": (pickled, r"only adapter_model\.bin, a pickle.*save it again.*adapter_model\.safetensors"),
    "truncated": (truncated, r"adapter_model\.safetensors is damaged"),
    "empty folder": (empty_folder, r"holds no adapter_config\.json"),
    "no path": (lambda folder: str(folder), r"does not exist"),
    "config is not JSON": (broken_config, r"adapter_config\.json cannot be read"),
    **{f"config: {key}={value!r}": _config_case(key, value) for key, values in BAD_VALUES.items() for value in values},
    "not LoRA": (lambda folder: changed_config(folder, peft_type="IA3"), r"peft_type is 'IA3'; only 'LORA'"),
}
