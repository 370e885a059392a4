"""A.2 and A.6 with two processes: DDP and FSDP2 give what one process gives."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from peft_arrow import ArrowLoraConfig

from .adapters import TOLERANCE, VISIBLE, difference, logits, routed
from .bases import llama, token_ids


STEPS, RATE = 3, 1.0


def trained(model, wrap=lambda model: model, rows=slice(None)) -> torch.Tensor:
    """Logits after some steps of gradient descent on the mean loss of `rows`; each step uses all trainables."""
    wrapped = wrap(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    ids = token_ids(rows=4)[rows]
    for _ in range(STEPS):
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return logits(wrapped)


def trainable_model(folders):
    return get_peft_model(llama(), ArrowLoraConfig(adapters=folders, top_k=1))


def shard_leaves(model, parts=("arrow_lora_A", "arrow_lora_B")):
    """Each factor of its own, as PEFT's FSDP policy does for LoRA."""
    for layer in model.base_model.routed_layers().values():
        for part in parts:
            fully_shard(getattr(layer, part)["default"])
    return model


def shard_all_leaves(model):
    return shard_leaves(model, ("arrow_lora_A", "arrow_lora_B", "arrow_lora_router"))


def shard_decoder_layers(model):
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    return model


def attempt(work):
    """The result, or the error's text: a process that dies would leave the other one waiting."""
    try:
        return work()
    except (RuntimeError, ValueError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def worker(rank: int, folders: list[str], port: int, out: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.manual_seed(rank)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mine = slice(2 * rank, 2 * rank + 2)
    found = {
        "inference": logits(routed(folders, top_k=2)),
        "ddp": attempt(lambda: trained(trainable_model(folders), DistributedDataParallel, mine)),
        "layers": attempt(lambda: trained(trainable_model(folders), shard_decoder_layers, mine)),
        "leaves": attempt(lambda: trained(trainable_model(folders), shard_leaves, mine)),
        "leaves and router": attempt(lambda: trained(trainable_model(folders), shard_all_leaves, mine)),
        "leaves, inference": attempt(lambda: logits(shard_leaves(routed(folders, top_k=1)))),
    }
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, trio) -> list[dict]:
    """What each of two processes found."""
    out = str(tmp_path_factory.mktemp("ranks"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(worker, (list(trio.values()), port, out), nprocs=2)
    return [torch.load(f"{out}/{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def alone(trio) -> torch.Tensor:
    """One process on all rows."""
    model = trainable_model(list(trio.values()))
    before = logits(model)
    after = trained(model)
    assert difference(after, before) > VISIBLE
    return after


def test_ranks_agree_without_a_seed(ranks, trio):
    expected = logits(routed(list(trio.values()), top_k=2))
    assert all(torch.equal(rank["inference"], expected) for rank in ranks)


@pytest.mark.parametrize("way", ["ddp", "layers", "leaves", "leaves and router"])
def test_training_equals_one_process(ranks, alone, way):
    """DDP needs no `find_unused_parameters`: there are no dead trainables."""
    for rank in ranks:
        assert not isinstance(rank[way], str), rank[way]
        assert difference(rank[way], alone) <= 10 * TOLERANCE


def test_inference_with_sharded_factors(ranks, trio):
    expected = logits(routed(list(trio.values()), top_k=1))
    for rank in ranks:
        assert not isinstance(rank["leaves, inference"], str), rank["leaves, inference"]
        assert difference(rank["leaves, inference"], expected) <= TOLERANCE


def test_leaves_are_linear_modules(trio):
    """What sharding policies look for: modules that are called and own one weight."""
    for layer in routed(trio).base_model.routed_layers().values():
        assert all(isinstance(layer.get_submodule(f"arrow_lora_{half}.default"), nn.Linear) for half in "AB")
