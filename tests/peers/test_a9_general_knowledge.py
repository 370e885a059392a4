"""A.9: GenKnowSub subtracts updates, once, in a new library, and never while a model runs."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from peft_arrow import AdapterLibrary, subtract_general

from .adapters import (
    TOLERANCE,
    VISIBLE,
    adapter,
    difference,
    edit_tensors,
    expert_files,
    logits,
    plain,
    routed,
    scaling_of,
)
from .bases import inputs_of, llama


BASE = "me/tiny"


def library_of(*folders: str) -> AdapterLibrary:
    return AdapterLibrary.from_pretrained(list(folders), BASE)


def updates(folder: str) -> dict[str, torch.Tensor]:
    """delta-W of each module of a saved adapter, float64."""
    config, tensors = expert_files(folder)
    found = {}
    for key, lora_A in tensors.items():
        if key.endswith(".lora_A"):
            module = key.removesuffix(".lora_A")
            lora_B = tensors[f"{module}.lora_B"].double()
            found[module] = (
                scaling_of({"use_rslora": False, **config}, module, lora_A.shape[0]) * lora_B @ lora_A.double()
            )
    return found


def saved(library: AdapterLibrary, folder: Path) -> str:
    """The folder of the library's first expert."""
    library.save_pretrained(folder)
    return str(folder / "experts" / next(iter(library)))


def error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], scale: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over that of `scale`, all modules together."""
    assert found.keys() == expected.keys()
    square = lambda tensors: sum(float(tensor.square().sum()) for tensor in tensors)  # noqa: E731
    return (square(found[m] - expected[m] for m in expected) / square(scale.values())) ** 0.5


def rewritten(folder: str, target: Path, mix) -> str:
    """A copy whose factors are mix(A, B) = (M A, B M^-1): the same update."""
    shutil.copytree(folder, target)

    def edit(tensors):
        for key in [key for key in tensors if "lora_A" in key]:
            other = key.replace("lora_A", "lora_B")
            tensors[key], tensors[other] = (half.contiguous() for half in mix(tensors[key], tensors[other]))

    edit_tensors(str(target), edit)
    return str(target)


def rotate(lora_A: torch.Tensor, lora_B: torch.Tensor):
    Q = torch.linalg.qr(torch.randn(len(lora_A), len(lora_A), generator=torch.Generator().manual_seed(0)))[0]
    return Q @ lora_A, lora_B @ Q.T


def negate(lora_A: torch.Tensor, lora_B: torch.Tensor):
    return -lora_A, -lora_B


def digests(folder: str | Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).rglob("*.*")}


@pytest.mark.parametrize(
    ("alpha", "generals"),
    [
        (16, [{}]),
        (16, [{}, {}, {}]),
        (8, [{"lora_alpha": 64}]),
        (64, [{"lora_alpha": 8}]),
        (16, [{"use_rslora": True}]),
    ],
)
def test_the_mean_update_is_subtracted(tmp_path, alpha, generals):
    task = adapter(tmp_path / "task", seed=1, r=4, lora_alpha=alpha)
    folders = [
        adapter(tmp_path / f"general{seed}", seed=seed, **{"r": 4, **options})
        for seed, options in enumerate(generals, 10)
    ]
    found = updates(saved(subtract_general(library_of(task), folders), tmp_path / "purified"))
    own, theirs = updates(task), [updates(folder) for folder in folders]
    expected = {module: own[module] - sum(one[module] for one in theirs) / len(theirs) for module in own}
    assert error(found, expected, expected) < 1e-6
    assert error(own, expected, expected) > 0.1, "so little is subtracted that this would show nothing"


def test_logits_are_those_of_the_dense_difference(tmp_path, trio):
    """Of the expert loaded alone, and routed: the base with W + dW_t - dW_g."""
    purified = subtract_general(library_of(trio["one"]), trio["two"])
    base, inputs = llama(), inputs_of(llama)
    for folder, sign in ((trio["one"], 1), (trio["two"], -1)):
        for module, update in updates(folder).items():
            base.get_submodule(module).weight.data += sign * update.float()
    expected = logits(base, **inputs)
    assert difference(expected, logits(plain(trio["one"]), **inputs)) > VISIBLE
    assert difference(logits(plain(saved(purified, tmp_path / "purified")), **inputs), expected) < TOLERANCE
    assert difference(logits(routed(purified, top_k=1), **inputs), expected) < TOLERANCE


@pytest.mark.parametrize("mix", [rotate, negate])
def test_the_expert_itself_written_otherwise_leaves_nothing(tmp_path, trio, mix):
    same = rewritten(trio["one"], tmp_path / "same", mix)
    with pytest.raises(ValueError, match=r"'one'.*: nothing is left of its update.*library\.without\(\['one'\]\)"):
        subtract_general(library_of(trio["one"], trio["two"]), same)


def test_an_adapter_and_its_negated_factors_are_one_update(tmp_path, trio):
    twice = [trio["two"], rewritten(trio["two"], tmp_path / "negated", negate)]
    once = updates(saved(subtract_general(library_of(trio["one"]), trio["two"]), tmp_path / "once"))
    both = updates(saved(subtract_general(library_of(trio["one"]), twice), tmp_path / "both"))
    assert error(both, once, once) < 1e-6


def test_files_are_untouched_and_running_changes_nothing(tmp_path, trio):
    """Subtracting, routing, the forward of a training step, saving: given files and new experts stay as they are."""
    folders = [str(shutil.copytree(trio[name], tmp_path / name)) for name in trio]
    before = digests(tmp_path)
    purified = subtract_general(library_of(*folders[:2]), folders[2])
    model = routed(purified, is_trainable=True)
    factors = {name: one for name, one in model.named_parameters() if "lora_A" in name or "lora_B" in name}
    weights = {name: one.detach().clone() for name, one in factors.items()}
    model.train()(**inputs_of(llama)).logits.square().mean().backward()
    assert weights and all(torch.equal(factors[name], weight) for name, weight in weights.items())
    model.save_pretrained(tmp_path / "model")
    assert digests(tmp_path).items() >= before.items()


def test_subtracted_once_however_often_it_is_saved(tmp_path, trio):
    purified = subtract_general(library_of(trio["one"], trio["two"]), trio["three"])
    expected = updates(saved(purified, tmp_path / "first"))
    read = AdapterLibrary.from_pretrained(tmp_path / "first")
    logits(routed(read))
    again = updates(saved(read, tmp_path / "second"))
    assert all(torch.equal(again[module], expected[module]) for module in expected)


def test_experts_that_come_later(tmp_path, trio):
    """Only the call subtracts, and from every expert that it is given; what is added later is added as it is."""
    first = subtract_general(library_of(trio["one"]), trio["three"])
    raw = updates(saved(first.add(trio["two"]).without("one"), tmp_path / "raw"))
    assert error(raw, updates(trio["two"]), raw) == 0
    found = updates(saved(subtract_general(library_of(trio["two"]), trio["three"]), tmp_path / "found"))
    own, general = updates(trio["two"]), updates(trio["three"])
    assert error(found, {module: own[module] - general[module] for module in own}, own) < 1e-6


def test_an_untrained_adapter_is_refused(trio):
    """Its update is zero; minus the general one it would be an expert that undoes the general one."""
    expert = library_of(trio["one"])["one"]
    zero = {key: tensor * ("lora_A" in key) for key, tensor in expert.tensors.items()}
    library = AdapterLibrary([replace(expert, tensors=zero)], BASE)
    with pytest.raises(ValueError, match="the whole update is zero"):
        subtract_general(library, trio["two"])


def test_the_general_adapter_is_not_needed_afterwards(tmp_path, trio):
    """It is no part of the model, and its name means nothing."""
    shutil.copytree(trio["two"], tmp_path / "gks_0")
    purified = subtract_general(library_of(trio["one"], trio["three"]).rename({"three": "gks_1"}), tmp_path / "gks_0")
    expected = logits(routed(purified))
    shutil.rmtree(tmp_path / "gks_0")
    model = routed(purified)
    assert model.expert_names == ["one", "gks_1"] and difference(logits(model), expected) == 0
    model.remove_expert("gks_1")
    assert difference(logits(model), expected) > 0


def test_other_ranks_and_modules(tmp_path, trio, mixed):
    """All of them exact; modules that only the general adapter has get minus its update."""
    found = updates(saved(subtract_general(library_of(trio["one"]), mixed["all"]), tmp_path / "purified"))
    own, general = updates(trio["one"]), updates(mixed["all"])
    expected = {module: own.get(module, 0) - update for module, update in general.items()}
    assert error(found, expected, expected) < 1e-6
