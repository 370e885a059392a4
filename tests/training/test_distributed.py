"""`accelerate launch` with two CPU processes (gloo): DDP and FSDP2 give what one process gives on the same rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors.torch import load_file

from tests.pico import pico_base
from tests.processes import environment, free_port
from tests.training import distributed_run
from tests.training.helpers import changed, factors_of_folders, prototype_error, relative_difference


DDP = {"distributed_type": "MULTI_GPU"}  # with use_cpu, accelerate's name for torchrun and gloo
FSDP2 = {
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "fsdp_reshard_after_forward": True,
        "fsdp_cpu_ram_efficient_loading": False,
        "fsdp_state_dict_type": "FULL_STATE_DICT",
    },
}
LAUNCHES = {"ddp": DDP, "fsdp2": FSDP2}
# Each case with that of the single process which it has to equal; `leaves` shards the experts' own modules.
CASES = {
    "ddp": {"all": "all", "subset": "subset"},
    "fsdp2": {"all": "all", "subset": "subset", "leaves": "all"},
}


def launch(root: Path, mode: str) -> None:
    """Run distributed_run.py in two processes of one thread."""
    common = {"use_cpu": True, "num_machines": 1, "num_processes": 2, "mixed_precision": "no"}
    config = root / "launch.json"
    config.write_text(json.dumps({"compute_environment": "LOCAL_MACHINE", **common, **LAUNCHES[mode]}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--main_process_port", str(free_port()), str(Path(distributed_run.__file__)), str(root), mode]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert answer.returncode == 0, f"{answer.stdout[-3000:]}\n{answer.stderr[-6000:]}"


@pytest.fixture(scope="module")
def single(adapter_folders) -> dict[str, tuple[torch.nn.Module, list[float]]]:
    """Model and losses of one process that takes the rows of both."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 1
    results = {case: distributed_run.train(accelerator, adapter_folders, case) for case in distributed_run.CASES}
    AcceleratorState._reset_state(reset_partial_state=True)
    return results


def saved_factors(folder: Path, trained_by_one: torch.nn.Module) -> dict:
    """The factors of a saved model by module and expert; the shapes are those of `trained_by_one`."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = trained_by_one.peft_config["default"].expert_names
    found = {}
    for module, layer in trained_by_one.base_model.routed_layers().items():
        experts, prefix = layer.experts["default"], f"base_model.model.{module}"
        pieces_A = tensors[f"{prefix}.arrow_lora_A.weight"].split(list(experts.ranks))
        pieces_B = tensors[f"{prefix}.arrow_lora_B.weight"].split(list(experts.ranks), dim=1)
        for position, piece_A, piece_B in zip(experts.positions, pieces_A, pieces_B):
            found[module, names[position]] = (piece_A, piece_B)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mode", LAUNCHES)
def test_two_processes_give_the_single_process_result(mode, single, adapter_folders, tmp_path):
    """One launch per test, because tests that share one may run in different workers."""
    (tmp_path / "adapters.json").write_text(json.dumps(adapter_folders))
    launch(tmp_path, mode)
    for case, reference in CASES[mode].items():
        folder = tmp_path / case
        model, losses = single[reference]
        report = json.loads((folder / "losses.json").read_text())
        assert report["processes"] == 2
        assert report["losses"] == pytest.approx(losses, abs=1e-5), case
        check_weights(folder, model, reference, adapter_folders, tmp_path / f"{case}-alone")
        check_reload(folder, model)


def check_weights(folder: Path, model, reference: str, adapters: dict[str, str], alone: Path) -> None:
    """The saved tensors are those of one process, prototypes included, and the right experts have moved."""
    model.save_pretrained(alone)
    one, two = (load_file(saved / "adapter_model.safetensors") for saved in (alone, folder))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert (tensor - two[key]).abs().max() < 2e-5, (folder.name, key)
    moves = changed(factors_of_folders(adapters), saved_factors(folder, model))
    trained = {"dates"} if reference == "subset" else {"plurals", "dates", "sql"}
    assert moves["all"] == trained
    assert moves["none"] == {"plurals", "dates", "sql"} - trained


def check_reload(folder: Path, model) -> None:
    """The folder gives the logits that the two processes and the single one had at the end."""
    again = PeftModel.from_pretrained(pico_base(), folder, adapter_name="again").eval()
    logits = torch.load(folder / "logits.pt")
    assert relative_difference(distributed_run.logits_of(again), logits) < 1e-6
    assert prototype_error(again, "again") < 1e-5
    assert relative_difference(distributed_run.logits_of(model), logits) < 1e-5


def test_older_prototypes_would_give_other_losses(single):
    """The comparison of losses can tell whether each step was routed by the weights of that step."""
    fresh, frozen = single["all"][1], single["frozen"][1]
    assert fresh[0] == frozen[0]
    assert abs(fresh[1] - frozen[1]) > 1e-3 and abs(fresh[2] - frozen[2]) > 1e-3
    assert abs(fresh[1] - single["subset"][1][1]) > 1e-3
