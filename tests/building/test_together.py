"""Builds under FSDP2 by two CPU processes that train each expert together: the library of one process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file

from peft_arrow import train_library
from tests.building import sharded
from tests.building.data import TASKS, base_in
from tests.pico import pico_base
from tests.processes import environment, free_port
from tests.training.helpers import token_batch


pytestmark = pytest.mark.slow
FSDP = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_reshard_after_forward": True,
    "fsdp_cpu_ram_efficient_loading": True,
}


def launch(root: Path, output: str, kind: str = "private", states: str = "FULL_STATE_DICT", **options) -> tuple:
    """Build in two processes; returns the exit code, the reports of both, and what they printed."""
    config = {"compute_environment": "LOCAL_MACHINE", "use_cpu": True, "num_machines": 1, "mixed_precision": "no"}
    fsdp = {"distributed_type": "FSDP", "fsdp_config": {**FSDP, "fsdp_state_dict_type": states}}
    (root / "launch.json").write_text(json.dumps({**config, **fsdp, "num_processes": 2}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(root / "launch.json")]
    command += ["--main_process_port", str(free_port()), str(Path(sharded.__file__)), str(root), output, kind]
    for old in root.glob("report-*"):
        old.unlink()
    answer = subprocess.run(
        [*command, json.dumps(options)], capture_output=True, text=True, env=environment(), timeout=120
    )
    reports = [json.loads(path.read_text()) for path in sorted(root.glob("report-*"))]
    return answer.returncode, reports, f"{answer.stdout[-3000:]}\n{answer.stderr[-8000:]}"


def alone(root: Path, output: str, kind: str = "private", **options):
    """The same build in this process."""
    tasks = dict(list(TASKS.items())[:2])
    options = {"n_clusters": 1, "steps": 5, "progress": False, **sharded.TOGETHER, **options}
    return train_library(str(root / "my-base"), tasks, kind=kind, output_dir=root / output, **options)


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    files = sorted(folder.glob("*/*/adapter_model.safetensors"))
    return {str(file.parent.relative_to(folder)): load_file(file) for file in files}


def same(one: Path, other: Path) -> None:
    """The experts of all stages are the same within floating-point noise, and so is what their records tell."""
    first, second = weights(one), weights(other)
    assert first and first.keys() == second.keys()
    for expert, tensors in first.items():
        assert tensors.keys() == second[expert].keys(), expert
        for key, tensor in tensors.items():
            found = second[expert][key]
            assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
            assert (tensor - found).abs().max() < 1e-5, (expert, key)
        records = [json.loads((folder / expert / "training.json").read_text()) for folder in (one, other)]
        for field in ("identity", "steps", "tokens", "rows", "target_modules"):
            assert records[0][field] == records[1][field], (expert, field)
        assert records[0]["losses"] == pytest.approx(records[1]["losses"], abs=1e-4)


def test_two_processes_that_shard_the_base_give_the_library_of_one(tmp_path):
    """A step has 4 rows: two batches of 2 for one process, one batch of 2 for each of two."""
    base_in(tmp_path)
    recipe = {**sharded.TOGETHER["sft_config"], "gradient_accumulation_steps": 2}
    code, reports, told = launch(tmp_path, "two", "mbc", sft_config=recipe)
    assert code == 0, told
    assert [report["seen"] for report in reports] == [["sharded"] * 3] * 2, told
    library = alone(tmp_path, "one", "mbc", sft_config=recipe)
    same(tmp_path / "one-training", tmp_path / "two-training")
    assert not list((tmp_path / "two-training").glob("*/.*")), "neither checkpoints nor drafts are left"
    ids = token_batch(2)["input_ids"]
    for name in library:
        plain = [
            PeftModel.from_pretrained(pico_base(), str(tmp_path / output / "experts" / name)).eval()
            for output in ("one", "two")
        ]
        with torch.no_grad():
            first, second = (model(input_ids=ids).logits for model in plain)
            assert (first - second).abs().max() < 1e-5
            assert (first - pico_base().eval()(input_ids=ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("states", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_killed_expert_goes_on_from_its_checkpoint(states, tmp_path):
    """The second process kills itself in `task1` after the checkpoint of step 2; one process trains it anew."""
    base_in(tmp_path)
    code, reports, told = launch(tmp_path, "two", states=states, fault="kill")
    assert code != 0 and not reports
    assert list(tmp_path.glob("two-training/private/.task1.checkpoints/checkpoint-2")), told
    shutil.copytree(tmp_path / "two-training", tmp_path / "other-training")
    code, reports, told = launch(tmp_path, "two", states=states)
    assert code == 0, told
    continues = Version(accelerate.__version__) >= Version("1.15")
    assert reports[0]["resumed"] == (["checkpoint-2"] if continues else []), told
    alone(tmp_path, "one")
    same(tmp_path / "one-training", tmp_path / "two-training")
    alone(tmp_path, "other")
    same(tmp_path / "one-training", tmp_path / "other-training")


def test_a_loss_that_is_nan_fails_on_both_and_stops_nothing_else(tmp_path):
    base_in(tmp_path)
    code, reports, told = launch(tmp_path, "two", fault="nan", tasks=3)
    assert code == 0, told
    assert [list(report["failures"]) for report in reports] == [["task1"]] * 2
    assert "NotFinite" in reports[0]["failures"]["task1"]
    assert sorted(path.name for path in (tmp_path / "two/experts").iterdir()) == ["task0", "task2"]


def test_a_fault_of_one_process_ends_all(tmp_path):
    """The other one waits inside the trainer; nobody can tell it to go on with the next expert."""
    base_in(tmp_path)
    code, reports, told = launch(tmp_path, "two", fault="one")
    assert code != 0 and not reports
    assert "process 1 failed (OSError: no space left on device), and another one did not" in told
