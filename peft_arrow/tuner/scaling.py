"""How strongly a PEFT adapter's experts act in a layer: what PEFT calls the scale of an adapter."""

from __future__ import annotations


class ScalingMixin:
    """The part of a layer that scales its adapters' updates."""

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the adapter's routed update by `scale` (1 is the original)."""
        if adapter in self.scales:
            self.scales[adapter] = float(scale)
            self.columns[adapter] = {}
            self.forget_plans()

    def forget_plans(self) -> None:
        """Have what is kept for inference made anew."""
        for kept in (*self.shared.values(), *self.pages.values()):
            kept.forget()

    def scale_layer(self, scale: float) -> None:
        """Multiply the active adapters' scales by `scale`."""
        for adapter in self.active_adapters:
            self.set_scale(adapter, self.scales.get(adapter, 1.0) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the active adapters' scales by `scale`, or set them back to 1."""
        for adapter in self.active_adapters:
            self.set_scale(adapter, 1.0 if scale is None else self.scales.get(adapter, 1.0) / scale)
