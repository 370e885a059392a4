"""Frozen experts that rest in CPU memory or in a memory-mapped file, and come to the compute device when chosen."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from typing import TYPE_CHECKING

import torch

from ..ops import is_materialised
from .bank import PagedLinear, bank_modules
from .expert_store import BankShape, ExpertStore, check_any_frozen, discarded_on_failure
from .hot_set import HotSet, paged_bank
from .store_options import check_paging


if TYPE_CHECKING:
    from .layer import ArrowLoraLinear


class PagingMixin:
    """Methods of `ArrowLoraModel` that page experts; `expert_stores` has the store of each paged PEFT adapter."""

    expert_stores: dict[str, ExpertStore]

    def page_experts(self, store: str | PathLike, hot_experts: int = 64) -> None:
        """Let the active adapter's frozen experts rest in CPU memory or in a file; only a hot set is on the device.

        How, not what: results are the same, and it is neither saved nor in a checkpoint. Prototypes stay where they
        are, so all experts are scored as before. Trainable experts stay too; an adapter loaded with
        `is_trainable=False` is frozen as long as it is paged.

        Args:
            store (`str` or `PathLike`):
                `"cpu"`: CPU memory, pinned where there is CUDA. A folder: one memory-mapped file in it, which belongs
                to this model and is removed by `unpage_experts`, or when the model or the process ends.
            hot_experts (`int`):
                Experts of a layer that lie on the compute device, in slots made at the first call; the least recently
                used are replaced. A call that chooses more is done in parts. Where the compute device is the CPU
                there are no slots: the factors are used where they rest.

        Raises:
            ValueError: a wrong argument, experts that are paged already, all trainable, sharded or offloaded.
            OSError: the file cannot be made; nothing has changed.
        """
        adapter_name, paging = self.active_arrow_adapter(), check_paging(store, hot_experts)
        if adapter_name in self.expert_stores:
            raise ValueError(
                f"store={str(store)!r} is not allowed while the experts of {adapter_name!r} are paged; call "
                "unpage_experts() first."
            )
        is_main = self.peft_config[adapter_name].inference_mode
        shapes = {}
        for module, layer in self.routed_layers(adapter_name).items():
            if layer.experts[adapter_name].bank(is_main):
                lora_A, lora_B = (half.weight for half in bank_modules(layer, adapter_name, is_main))
                _check_whole(adapter_name, module, lora_A, lora_B)
                shapes[module, is_main] = BankShape(*lora_A.shape, lora_B.shape[0], lora_A.dtype)
        check_any_frozen(adapter_name, shapes)
        made = ExpertStore(paging, adapter_name, shapes)
        with discarded_on_failure(made):
            moved = self._copied(adapter_name, made)
            if made.file is not None:
                moved = list(moved)
                made.finish()
            for layer, is_main, weights in moved:
                layer.replace_bank(adapter_name, is_main, weights, HotSet(made.hot_experts))
                layer.kept_frozen[adapter_name] = layer.kept_frozen[adapter_name] or is_main
        self.expert_stores[adapter_name] = made

    def unpage_experts(self) -> None:
        """Put the active adapter's experts back on their layers' devices and remove the store's file.

        Raises:
            ValueError: they are not paged.
        """
        adapter_name = self.active_arrow_adapter()
        if adapter_name not in self.expert_stores:
            raise ValueError(f"the experts of {adapter_name!r} are not paged; page_experts(store) does that.")
        for layer in self.routed_layers(adapter_name).values():
            is_main = paged_bank(layer, adapter_name)
            if is_main is None:
                continue
            device = layer.arrow_lora_router[adapter_name].weight.device
            with torch.inference_mode(False), torch.no_grad():  # in this order: the first turns gradients on
                weights = tuple(
                    torch.empty(half.weight.shape, dtype=half.weight.dtype, device=device).copy_(half.weight)
                    for half in bank_modules(layer, adapter_name, is_main)
                )
            layer.replace_bank(adapter_name, is_main, weights, None)
            layer.kept_frozen[adapter_name] = self.peft_config[adapter_name].keeps_frozen()
        self.expert_stores.pop(adapter_name).discard()

    def _copied(self, adapter_name: str, store: ExpertStore) -> Iterator[tuple[ArrowLoraLinear, bool, tuple]]:
        """Each paged layer, its bank, and copies of the bank's factors in the store."""
        layers = self.routed_layers(adapter_name)
        for module, is_main in store.shapes:
            with torch.inference_mode(False), torch.no_grad():  # in this order: the first turns gradients on
                weights = store.bank(module, is_main)
                for weight, half in zip(weights, bank_modules(layers[module], adapter_name, is_main), strict=True):
                    weight.copy_(half.weight)
            yield layers[module], is_main, weights

    def drop_store(self, adapter_name: str) -> None:
        """Forget an adapter's store and remove its file."""
        store = self.expert_stores.pop(adapter_name, None)
        if store is not None:
            store.discard()

    def _apply(self, fn, recurse: bool = True):
        """As in torch; a change of dtype is refused before anything is changed."""
        for adapter_name in self.expert_stores:
            for layer in self.routed_layers(adapter_name).values():
                for half in _paged_linears(layer, adapter_name):
                    half.check_dtype(fn)
        return super()._apply(fn, recurse)


def _paged_linears(layer: ArrowLoraLinear, adapter_name: str) -> list[PagedLinear]:
    is_main = paged_bank(layer, adapter_name)
    return [] if is_main is None else list(bank_modules(layer, adapter_name, is_main))


def _check_whole(adapter_name: str, module: str, *weights: torch.Tensor) -> None:
    if not is_materialised(*weights):
        raise ValueError(
            f"the experts of {adapter_name!r} in {module} are sharded, offloaded or on the meta device; only whole "
            "weights are paged."
        )
