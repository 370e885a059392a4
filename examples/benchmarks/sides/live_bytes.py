"""The most bytes that are alive at once of what was allocated inside chosen layers."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts what is allocated while one of the layers is in its forward, until it is freed, wherever that happens.

    Every operator is seen below autograd. A result whose storage is none of the operator's inputs' is a new
    allocation; its bytes count until the storage is freed, which a weak reference tells. So outputs count as long as
    the model keeps them, for the base as for others, and what a layer computes for its neighbours counts until they
    have used it. Weights, and whatever was made before, do not count. What an operator allocates for itself and frees
    before it returns (workspaces of matrix products, the inside of a compiled or custom operator) is not seen.

    Args:
        layers (`Iterable[nn.Module]`): the layers.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = list(layers)
        self.live: dict[int, int] = {}
        self.peak = 0
        self._depth = 0
        self._hooks: list = []

    def __enter__(self):
        for layer in self.layers:
            self._hooks.append(layer.register_forward_pre_hook(self._go_in))
            self._hooks.append(layer.register_forward_hook(self._come_out, always_call=True))
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*error)

    def _go_in(self, *_) -> None:
        self._depth += 1

    def _come_out(self, *_) -> None:
        self._depth -= 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if self._depth:
            known = {storage._cdata for storage in _storages((args, kwargs))}
            for storage in _storages(result):
                if storage._cdata not in known and storage._cdata not in self.live:
                    self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        self.live[key] = storage.nbytes()
        weakref.finalize(storage, self.live.pop, key, None)
        self.peak = max(self.peak, sum(self.live.values()))


def _storages(values) -> list[torch.UntypedStorage]:
    found = []
    for leaf in tree_leaves(values):
        if isinstance(leaf, torch.Tensor) and leaf.layout == torch.sparse_csr:  # it has no storage, its parts do
            found += _storages([leaf.crow_indices(), leaf.col_indices(), leaf.values()])
        elif isinstance(leaf, torch.Tensor):
            found.append(leaf.untyped_storage())
    return found


def peak_bytes(model: nn.Module, layers: Iterable[nn.Module], ids: torch.Tensor) -> int:
    """The largest live bytes inside `layers` in a prefill of `ids` without a cache, logits of the last token only."""
    with LiveBytes(layers) as counter:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return counter.peak
