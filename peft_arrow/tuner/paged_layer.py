"""The part of a layer that applies experts, in place or from slots."""

from __future__ import annotations

import torch

from ..ops import routed_lora
from .bank import BANKS, FactorStacks, bank_modules, linear_from
from .expert_layout import lay_out_chosen
from .hot_set import HotSet, needs_slots, paged_bank


class PagedLayerMixin:
    """The part of a layer that applies experts, wherever they rest."""

    def paged_weights(self, adapter_name: str) -> list[torch.Tensor]:
        """The factors of the paged bank: A (R, I) and B (O, R); empty where nothing is paged."""
        if adapter_name not in self.pages:
            return []
        return [half.weight for half in bank_modules(self, adapter_name, paged_bank(self, adapter_name))]

    def uses_slots(self, adapter_name: str, device: torch.device) -> bool:
        """Whether the adapter's experts have to be brought to this device to be used there."""
        return any(needs_slots(weight.device, device) for weight in self.paged_weights(adapter_name))

    def apply_experts(
        self, adapter_name: str, x_TI: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """The weighted expert outputs, (T, O); arguments as for `routed_lora`.

        Raises:
            ValueError: paged experts are to be trained.
        """
        paged = self.paged_weights(adapter_name)
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in paged):
            raise ValueError(
                f"requires_grad=True is not allowed for the paged experts of {adapter_name!r}, which are frozen; call "
                "model.unpage_experts() first."
            )
        options = {"aggregation": self.aggregations[adapter_name], "kernel": self.kernels[adapter_name]}
        if self.uses_slots(adapter_name, x_TI.device):
            x_TI = self._cast_input_dtype(x_TI, paged[0].dtype)
            return self.pages[adapter_name].apply(self, adapter_name, x_TI, index_TK, weights_TK, options)
        stack = self.stack(adapter_name, x_TI.device)
        lay_out_chosen(stack, index_TK.shape[1])
        x_TI = self._cast_input_dtype(x_TI, stack.banks[0].lora_A.weight.dtype)
        return routed_lora(x_TI, stack, index_TK, weights_TK, **options)

    def follow_store(self, adapter_name: str, stacks: FactorStacks | None, keep_frozen: bool) -> None:
        """Remember whether the experts of `stacks` rest in a store; a main bank that does is never trained."""
        self.pages.pop(adapter_name, None)
        paged = [] if stacks is None else stacks.paged
        if paged:
            self.pages[adapter_name] = HotSet(stacks.store.hot_experts)
        self.kept_frozen[adapter_name] = keep_frozen or True in paged

    def replace_bank(self, adapter_name: str, is_main: bool, weights: tuple, hot: HotSet | None) -> None:
        """Put equal factors in the place of a bank's, which changes where they lie and nothing else."""
        is_clean = self.is_clean(adapter_name)
        for name, weight in zip(BANKS[is_main], weights, strict=True):
            getattr(self, name)[adapter_name] = linear_from(weight, hot is not None).requires_grad_(False)
        self.forget_plans()
        self.pages.pop(adapter_name, None)
        if hot is not None:
            self.pages[adapter_name] = hot
        if is_clean:
            self._remember(adapter_name)
