"""A short vector for each adapter whose inner products are nearly those of the updates, made from the factors alone.

A tensor sketch (Pham and Pagh 2013, https://dl.acm.org/doi/10.1145/2487575.2487591; Avron, Nguyen and Woodruff 2014,
https://papers.nips.cc/paper/5240-subspace-embeddings-for-the-polynomial-kernel): entry (o, i) of a module's delta-W
goes, with a random sign, to place (h(o) + g(i)) mod D. For a rank-one update b a^T that is the circular convolution of
the count sketches of b and of a, so for B A it is one FFT for each row of A and each column of B. The map is linear,
modules are added up, and delta-W is never formed: r (I + O + D log D) operations a module.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable

import numpy as np
import torch

from ..library.adapter import Adapter
from ..library.delta import FactorReader


class DeltaSketch:
    """A seeded map from an adapter to `dim` numbers; equal arguments make the same map on every machine.

    For updates X and Y of any ranks, E <SX, SY> = <X, Y> and E (<SX, SY> - <X, Y>)^2 <= 8 / dim |X|^2 |Y|^2, so by
    Chebyshev a cosine is off by more than e with probability at most 8 / (dim e^2). Over many modules or ranks the
    error is nearly normal with variance (1 + cos^2) / dim: see `sketch_error`.

    Args:
        dim (`int`): length of the vectors.
        seed (`int`): of the map.
        module_weight (`Callable`, *optional*): module name -> factor of its inner product; 1 by default.
    """

    def __init__(self, dim: int, seed: int, module_weight: Callable[[str], float] | None = None) -> None:
        self.dim, self.seed, self.module_weight = dim, seed, module_weight
        self._maps: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, adapter: Adapter) -> tuple[np.ndarray, float]:
        """The sketch, (dim,) float64, and the exact length of the update; the adapter is read once and let go.

        Raises:
            ValueError: the adapter is no plain LoRA.
        """
        spectrum = torch.zeros(self.dim // 2 + 1, dtype=torch.complex128)
        square = 0.0
        for module, factor in FactorReader(adapter, keep=True).items():
            weight = 1.0 if self.module_weight is None else self.module_weight(module)
            if not weight:
                continue
            lora_A, lora_BT = (half.detach().cpu().float() for half in (factor.lora_A, factor.lora_B.T))
            scale = math.sqrt(weight) * factor.scaling
            double_A, double_BT = lora_A.double(), lora_BT.double()
            square += scale**2 * float(((double_A @ double_A.T) * (double_BT @ double_BT.T)).sum())
            shape = (module, lora_A.shape[1], lora_BT.shape[1])
            halves = (self._count(half, (*shape, side)) for half, side in ((lora_A, "in"), (lora_BT, "out")))
            spectrum += scale * math.prod(torch.fft.rfft(half) for half in halves).sum(0)
        return torch.fft.irfft(spectrum, n=self.dim).numpy(), math.sqrt(max(square, 0.0))

    def _count(self, rows: torch.Tensor, key: tuple) -> torch.Tensor:
        """The count sketch of each row: (r, size) -> (r, dim)."""
        if key not in self._maps:
            self._maps[key] = self._draw(key, rows.shape[1])
        places, signs = self._maps[key]
        return torch.zeros(rows.shape[0], self.dim).index_add_(1, places, rows * signs)

    def _draw(self, key: tuple, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each index goes and with which sign, from the raw bits, which numpy keeps over its versions."""
        digest = hashlib.sha256(repr((self.seed, *key)).encode()).digest()
        bits = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(size)
        places = (bits >> np.uint64(16)) % np.uint64(self.dim)
        signs = np.where(bits & np.uint64(1), 1.0, -1.0)
        return torch.from_numpy(places.astype(np.int64)), torch.from_numpy(signs.astype(np.float32))


def sketch_adapters(adapters: Iterable[Adapter], sketch: DeltaSketch) -> np.ndarray:
    """The sketches of the updates at length 1, (N, dim) float32; one adapter is in memory at a time.

    The inner product of two rows is the cosine of the updates within `sketch_error(sketch.dim)`. Rows do not depend on
    each other: several processes can make a part each.

    Raises:
        ValueError: an adapter is no plain LoRA, or its update is zero or not finite.
    """
    rows = []
    for adapter in adapters:
        row, length = sketch(adapter)
        check_length(adapter.name, length)
        rows.append((row / length).astype(np.float32))
    return np.stack(rows)


def check_length(name: str, length: float) -> None:
    """Raise a `ValueError` that names the adapter unless the length of its update is positive and finite."""
    if not math.isfinite(length):
        raise ValueError(f"adapter {name!r}: its update holds NaN or Inf.")
    if length <= 0:
        raise ValueError(f"adapter {name!r}: its whole update is zero in the modules that count; it fits no cluster.")


def sketch_error(dim: int, cosine: float = 0.0, *, worst: bool = False) -> float:
    """Standard error of a cosine by sketches.

    Args:
        dim (`int`): length of the sketches.
        cosine (`float`): the true cosine.
        worst (`bool`):
            True: sqrt(8 / dim), a bound for any two updates. False: sqrt((1 + cosine^2) / dim), what full hashing
            gives and what adapters of many modules come close to.
    """
    return math.sqrt(8 / dim) if worst else math.sqrt((1 + cosine**2) / dim)
