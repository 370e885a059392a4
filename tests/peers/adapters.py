"""Plain PEFT adapters for the tiny models, and what the peers' tests compare with.

Nothing here calls `peft_arrow` but `routed`, which is what is under test.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_arrow import ArrowLoraModel

from .bases import inputs_of, llama


TOLERANCE = 1e-5
VISIBLE = 1e-3


def adapter(folder, make_base=llama, *, seed: int = 1, task_type: str | None = "CAUSAL_LM", **lora_config) -> str:
    """Save a plain PEFT LoRA with random factors (and a random head, where it trains one); return its folder."""
    options = {"init_lora_weights": False, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **lora_config}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice about the options of the adapter
        torch.manual_seed(seed)
        model = get_peft_model(make_base(), LoraConfig(task_type=task_type, **options))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".modules_to_save." in name:
                    parameter.normal_(std=0.5)
        model.save_pretrained(str(folder))
    return str(folder)


def edit_tensors(folder: str, edit) -> None:
    """Rewrite the adapter's file with what `edit(tensors)` makes of it (in place)."""
    path = Path(folder) / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder: str, **values) -> None:
    """Overwrite fields of the adapter's config file."""
    path = Path(folder) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def first_output(output) -> torch.Tensor:
    """The logits, or for CLIP both towers' similarity."""
    if hasattr(output, "logits_per_image"):
        return output.logits_per_image
    return output.logits if hasattr(output, "logits") else output[0]


@torch.no_grad()
def logits(model, **inputs) -> torch.Tensor:
    """The model's first output; for a model of this package the default inputs are a batch of ids."""
    return first_output(model(**(inputs or inputs_of(llama))))


def plain(folder: str, make_base=llama, **options) -> PeftModel:
    """The adapter as plain PEFT applies it."""
    return PeftModel.from_pretrained(make_base(), folder, **options).eval()


def routed(adapters, make_base=llama, **options) -> PeftModel:
    """The adapters routed by this package."""
    return ArrowLoraModel.from_pretrained(make_base(), adapters, **options)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest absolute difference; shapes must agree."""
    assert one.shape == other.shape
    return (one.double() - other.double()).abs().max().item()


def assert_one_expert_is_plain(folder: str, make_base=llama, **options) -> None:
    """With one expert and top_k=1 the routing weight is exactly 1: logits are those of the plain adapter."""
    inputs = inputs_of(make_base)
    expected, base = logits(plain(folder, make_base), **inputs), logits(make_base(), **inputs)
    assert difference(expected, base) > VISIBLE, "the adapter does nothing, so this test would show nothing"
    found = logits(routed([folder], make_base, top_k=1, **options), **inputs)
    assert difference(found, expected) <= TOLERANCE * max(1.0, expected.abs().max().item())


def top_right_direction(lora_A: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
    """The unit vector that B A stretches most, from the SVD of the full matrix in float64."""
    return torch.linalg.svd(lora_B.double() @ lora_A.double(), full_matrices=False).Vh[0]


def expert_files(folder: str) -> tuple[dict, dict]:
    """The config and the tensors of a saved adapter, by short key (`model.layers.0....lora_A`)."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    return config, {k.removeprefix("base_model.model.").removesuffix(".weight"): v for k, v in tensors.items()}


def scaling_of(config: dict, module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r), with the alpha that the patterns give this module."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
    return alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank


def reference_delta(x: torch.Tensor, folders: list[str], module: str, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token and expert by expert: sum_i w_i s_i B_i A_i x, w = softmax over the top k of |x . v_i|.

    Returns:
        The update (T, O) in float64 and, per token, whether the choice is clear (k-th and next score differ).
    """
    experts = []
    for folder in folders:
        config, tensors = expert_files(folder)
        if f"{module}.lora_A" in tensors:
            A, B = tensors[f"{module}.lora_A"].double(), tensors[f"{module}.lora_B"].double()
            experts.append((A, B, scaling_of(config, module, A.shape[0]), top_right_direction(A, B)))
    rows, clear = [], []
    for token in x.double().reshape(-1, x.shape[-1]):
        scores = sorted(((abs(float(token @ v)), e) for e, (*_, v) in enumerate(experts)), reverse=True)
        chosen = scores[:top_k]
        total = sum(math.exp(score - chosen[0][0]) for score, _ in chosen)
        clear.append(len(scores) <= top_k or chosen[-1][0] - scores[top_k][0] > TOLERANCE)
        row = 0.0
        for score, e in chosen:
            A, B, scaling, _ = experts[e]
            row = row + math.exp(score - chosen[0][0]) / total * scaling * (B @ (A @ token))
        rows.append(row)
    return torch.stack(rows), torch.tensor(clear)


def assert_layers_match(model, folders: list[str], make_base=llama, top_k: int = 4) -> None:
    """Every routed layer's output is the base layer's plus `reference_delta` of its input."""
    seen = {}
    layers = {name: m for name, m in model.get_base_model().named_modules() if hasattr(m, "arrow_lora_router")}
    names = {id(layer): name for name, layer in layers.items()}

    def record(layer, args, y):
        seen[names[id(layer)]] = (args[0], y)

    handles = [layer.register_forward_hook(record) for layer in layers.values()]
    logits(model, **inputs_of(make_base))
    for handle in handles:
        handle.remove()
    assert seen and seen.keys() == layers.keys()
    for name, (x, y) in seen.items():
        delta, clear = reference_delta(x, folders, name, top_k)
        with torch.no_grad():
            expected = layers[name].base_layer(x).double().reshape(delta.shape) + delta
        assert clear.float().mean() > 0.9 and delta.abs().max() > VISIBLE
        largest = max(1.0, expected.abs().max().item())
        assert difference(y.reshape(delta.shape)[clear], expected[clear]) <= TOLERANCE * largest, name


def snapshot(base: torch.nn.Module) -> dict:
    """Everything of a model that a failed call must leave as it was."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in base.state_dict().items()},
        "modules": [(name, type(module)) for name, module in base.named_modules()],
        "trainable": [(name, parameter.requires_grad) for name, parameter in base.named_parameters()],
        "objects": [id(parameter) for parameter in base.parameters()],
        "training": base.training,
    }


def assert_unchanged(base: torch.nn.Module, before: dict) -> None:
    after = snapshot(base)
    assert {k: v for k, v in after.items() if k != "tensors"} == {k: v for k, v in before.items() if k != "tensors"}
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, tensor in before["tensors"].items():
        assert torch.equal(after["tensors"][name], tensor), name
