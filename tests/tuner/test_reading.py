"""Adapters become stacked weights one at a time: what is read when, what is kept, and that every bit arrives."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_arrow import ArrowLoraModel
from peft_arrow.library.adapter import list_locations, load
from peft_arrow.library.files import WeightsFile
from peft_arrow.tuner.bank import FactorStacks, bank_modules
from peft_arrow.tuner.layouts import LayerExperts
from tests.pico import pico_adapter, pico_base


def cast_file(folder: str, dtype: torch.dtype) -> None:
    """Rewrite an adapter's file in another dtype."""
    path = Path(folder) / "adapter_model.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def factors_of(folder: str, module: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A and B of a module as the file has them."""
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    halves = [tensors.get(f"base_model.model.{module}.lora_{half}.weight") for half in "AB"]
    return None if None in halves else tuple(halves)


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The names of the folders whose weights are read, in that order; the factors read before must be gone by then."""
    names, alive = [], []
    original = WeightsFile.items

    def items(self):
        assert not any(reference() is not None for reference in alive), f"{names[-1]} is kept while another is read"
        found = original(self)
        alive.extend(weakref.ref(tensor) for key, tensor in found if ".lora_" in key)
        names.append(self.place.folder.name)
        return found

    monkeypatch.setattr(WeightsFile, "items", items)
    return names


def test_each_file_is_read_once_and_dropped(adapter_folders, reads):
    ArrowLoraModel.from_pretrained(pico_base(), adapter_folders)
    assert reads == list(adapter_folders)


def test_adapters_that_hold_their_place_are_read_alike(adapter_folders, reads):
    located = list_locations(adapter_folders)
    ArrowLoraModel.from_pretrained(pico_base(), [load(name, place) for name, place in located.items()])
    assert reads == list(adapter_folders)


def test_headers_are_checked_before_any_weight_is_read(tmp_path, adapter_folders, reads):
    """The last adapter is in the wrong: no file before it is read for nothing."""
    bad = pico_adapter(tmp_path / "bad", seed=1, r=4, target_modules=["q_proj"])
    path = Path(bad) / "adapter_model.safetensors"
    tensors = {key: t[:, :3].contiguous() if "lora_A" in key else t for key, t in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(ValueError, match="'bad'.*maps 3 to 32 features in the adapter, 32 to 32 in the base"):
        ArrowLoraModel.from_pretrained(pico_base(), {**adapter_folders, "bad": bad})
    assert reads == []


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_dtypes_that_are_no_factors(tmp_path, reads, dtype):
    folder = pico_adapter(tmp_path / "bad", seed=1, r=4, target_modules=["q_proj"])
    cast_file(folder, dtype)
    with pytest.raises(ValueError, match=r"'bad'.*q_proj\.lora_A holds NaN, Inf or no floating-point numbers of 16"):
        ArrowLoraModel.from_pretrained(pico_base(), [folder])
    assert reads == []


@pytest.mark.parametrize("trainable", [None, ["dates"], ["plurals", "sql"], []])
def test_every_bit_arrives(tmp_path, trainable):
    """Different ranks, modules and dtypes, in one bank or two: each bank is the concatenation of its experts."""
    verbs = {"r": 3, "target_modules": ["q_proj"], "rank_pattern": {"1.self_attn.q_proj": 5}}
    folders = {
        "plurals": pico_adapter(tmp_path / "plurals", seed=1, r=4, target_modules=["q_proj", "v_proj"]),
        "dates": pico_adapter(tmp_path / "dates", seed=2, r=8, target_modules="all-linear"),
        "sql": pico_adapter(tmp_path / "sql", seed=3, r=2, target_modules=["q_proj", "down_proj"]),
        "verbs": pico_adapter(tmp_path / "verbs", seed=4, **verbs),
    }
    cast_file(folders["dates"], torch.bfloat16)
    cast_file(folders["sql"], torch.float16)
    model = ArrowLoraModel.from_pretrained(pico_base(), folders, is_trainable=True, trainable_experts=trainable)
    layers = model.base_model.routed_layers()
    assert len(layers) == 14
    for module, layer in layers.items():
        found = {name: factors_of(folder, module) for name, folder in folders.items()}
        for is_main in (True, False):
            members = [
                factors
                for name, factors in found.items()
                if factors is not None and (trainable is None or name in trainable) == is_main
            ]
            if not members:
                continue
            lora_A, lora_B = bank_modules(layer, "default", is_main)
            assert torch.equal(lora_A.weight, torch.cat([A.float() for A, _ in members]))
            assert torch.equal(lora_B.weight, torch.cat([B.float() for _, B in members], dim=1))
            assert lora_A.weight.is_contiguous() and lora_B.weight.is_contiguous()


@pytest.mark.parametrize(
    ("dtypes", "widest"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float16, torch.float32), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
    ],
)
def test_a_bank_has_the_widest_dtype_of_its_experts(dtypes, widest):
    """Of the experts 3 and 9 in the main bank; expert 5, in the frozen bank, keeps its own."""
    experts = LayerExperts((3, 5, 9), (2, 1, 4), (1.0,) * 3, (0.0,) * 3, (True, False, True))
    order = (dtypes[0], torch.float16, dtypes[1])
    factors = [
        (torch.randn(rank, 6).to(dtype), torch.randn(5, rank).to(dtype))
        for rank, dtype in zip(experts.ranks, order, strict=True)
    ]
    stacks = FactorStacks(experts, [tuple(half.to("meta") for half in pair) for pair in factors])
    for position, pair in zip(experts.positions, factors, strict=True):
        stacks.put(position, *pair)
    (first_A, first_B), (frozen_A, frozen_B), (last_A, last_B) = factors
    main_A, main_B = stacks.banks[True]
    assert main_A.dtype == main_B.dtype == widest
    assert torch.equal(main_A, torch.cat([first_A.to(widest), last_A.to(widest)]))
    assert torch.equal(main_B, torch.cat([first_B.to(widest), last_B.to(widest)], dim=1))
    assert stacks.banks[False][0].dtype == torch.float16
    assert torch.equal(stacks.banks[False][0], frozen_A) and torch.equal(stacks.banks[False][1], frozen_B)


def test_in_memory_adapters_are_copied(adapter_folders):
    """Training a routed model, or changing the tensors afterwards, touches neither the adapter nor the model."""
    located = list_locations(adapter_folders)
    adapters = [load(name, place) for name, place in located.items()]
    tensors = dict(adapters[0].tensors.items())
    given = type(adapters[0])("given", adapters[0].config, tensors)
    model = ArrowLoraModel.from_pretrained(pico_base(), [given, adapters[1]])
    expected = ArrowLoraModel.from_pretrained(pico_base(), adapters[:2])
    for tensor in tensors.values():
        tensor.zero_()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


def test_heads_are_compared_one_by_one(tmp_path, reads):
    """The first head is kept while the others are read; a different one is refused, and the base stays as it was."""
    options = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    folders = {name: pico_adapter(tmp_path / name, seed=s, **options) for s, name in enumerate("abc")}
    path = Path(folders["c"]) / "adapter_model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}  # no maps of the file that is written
    head = next(tensor for key, tensor in tensors.items() if "lm_head" in key)
    head.add_(1.0)
    save_file(tensors, path)
    base = pico_base()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match="'a' and 'c' bring different trained modules .lm_head.weight.*'a', 'b', 'c'"):
        ArrowLoraModel.from_pretrained(base, folders)
    assert [name for name, _ in base.named_modules()] == names
    model = ArrowLoraModel.from_pretrained(base, folders, modules_to_save_from="c")
    assert torch.equal(model.base_model.model.lm_head.modules_to_save["default"].weight, head)
    assert reads == ["a", "b", "c"] * 2


def test_one_place_twice_is_said(adapter_folders, caplog):
    """By two adapters that were made apart from one folder, too."""
    located = list_locations({"sql": adapter_folders["sql"]})
    twice = [load(name, located["sql"]) for name in ("first", "second")]
    with caplog.at_level(logging.WARNING, logger="peft_arrow"):
        ArrowLoraModel.from_pretrained(pico_base(), [*twice, adapter_folders["dates"]])
    assert [record.getMessage() for record in caplog.records] == [
        "Experts 'first' and 'second' are the same adapter; a token can be sent to both."
    ]
