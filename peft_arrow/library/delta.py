"""Inner products of the updates delta W = s B A of many adapters, exact, without forming a delta W.

<dW_i, dW_j> = s_i s_j tr((B_i^T B_j)(A_j A_i^T)), summed over modules: the sum of the entries of A_i A_j^T times those
of B_i^T B_j. It does not change when A becomes Q A and B becomes B Q^-1, so it compares updates and not how they are
written, for any ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from tqdm import tqdm

from .adapter import Adapter
from .lora import KEY_PREFIX, Factors, LoraContent, outline_lora
from .lora_config import BASE_CHANGING_INITS


KEPT_BYTES = 2 * 2**30
BLOCK_RANKS = 512
# Of one module's factors; where all adapters' fit, each is read once and not once a block.
MODULE_BYTES = 2**30
# From so many adapters on a bar is shown.
MANY = 20
# Between what rounding to 8 bits leaves and what another run on the same data reaches; measured in docs/vetting.md.
SAME_COSINE = 0.99


@dataclass(frozen=True)
class NearDuplicate:
    """Two adapters whose updates are nearly one.

    Args:
        first, second (`str`): their names.
        cosine (`float`): of the two updates, all modules together.
        distance (`float`): the length of the difference over that of the longer update; 0 for equal ones.
    """

    first: str
    second: str
    cosine: float
    distance: float


class FactorReader:
    """An adapter's factors, module by module.

    Args:
        adapter (`Adapter`): a plain LoRA; a file on the Hub is downloaded.
        keep (`bool`): read the file once and keep it, instead of opening it for every module.

    Raises:
        ValueError:
            the adapter is no plain LoRA, or its initialisation changed the base weights, so that its update does not
            follow from its files alone.
    """

    def __init__(self, adapter: Adapter, *, keep: bool = False) -> None:
        init = adapter.config.get("init_lora_weights")
        if isinstance(init, str) and init.startswith(BASE_CHANGING_INITS):
            raise ValueError(
                f"{adapter.where}: with init_lora_weights={init!r} its update does not follow from its files alone."
            )
        self.outline: LoraContent = outline_lora(adapter)
        self._tensors: Mapping[str, torch.Tensor] = dict(adapter.tensors.items()) if keep else adapter.tensors
        self._keys = {key.removeprefix(KEY_PREFIX): key for key in self._tensors}

    def __getitem__(self, module: str) -> Factors:
        lora_A, lora_B = (self._tensors[self._keys[f"{module}.lora_{half}.weight"]] for half in "AB")
        return Factors(lora_A, lora_B, self.outline.factors[module].scaling)

    def items(self) -> Iterator[tuple[str, Factors]]:
        """(module, factors) of every module, one at a time."""
        for module in self.outline.factors:
            yield module, self[module]


def update_norm(factor: Factors) -> float:
    """|dW| in Frobenius norm, float64: the root of s^2 tr((B^T B)(A A^T))."""
    lora_A, lora_B = factor.lora_A.detach().double(), factor.lora_B.detach().double()
    square = ((lora_A @ lora_A.T) * (lora_B.T @ lora_B)).sum()
    return abs(factor.scaling) * float(square.clamp(min=0).sqrt())


def weight_bytes(adapter: Adapter) -> int:
    """Bytes of the factors, from shapes alone."""
    factors = outline_lora(adapter).factors.values()
    return sum(half.nelement() * half.element_size() for factor in factors for half in (factor.lora_A, factor.lora_B))


def delta_products(
    adapters: Iterable[Adapter],
    *,
    dtype: torch.dtype = torch.float64,
    module_weight: Callable[[str], float] | None = None,
) -> np.ndarray:
    """All inner products <dW_i, dW_j>; a module that one of the two lacks, or has in another shape, adds nothing.

    Beside files of 2 GiB together, which are kept, memory holds the factors of one module at a time: all adapters'
    where they take at most 1 GiB, else two blocks of 512 ranks; and 512 x 512 products.

    Args:
        adapters: plain LoRA adapters.
        dtype (`torch.dtype`): of the multiplications; float32 is twice as fast and good to about 1e-6.
        module_weight (`Callable`, *optional*):
            Module name -> what its inner product is multiplied by, 0 or more; modules with 0 are not read.

    Returns:
        `np.ndarray`: (N, N) float64, symmetric.

    Raises:
        ValueError: an adapter is no plain LoRA, or its update does not follow from its files.
    """
    adapters = list(adapters)
    keep = sum(weight_bytes(adapter) for adapter in adapters) <= KEPT_BYTES
    few = {"leave": False, "disable": len(adapters) < MANY}
    readers = [FactorReader(adapter, keep=keep) for adapter in tqdm(adapters, "Reading", unit="adapter", **few)]
    places: dict[tuple[str, int, int], list[int]] = {}
    for position, reader in enumerate(readers):
        for module, factor in reader.outline.factors.items():
            places.setdefault((module, factor.lora_A.shape[1], factor.lora_B.shape[0]), []).append(position)
    products = np.zeros((len(readers), len(readers)))
    for (module, _, _), members in tqdm(places.items(), "Comparing updates", unit="module", **few):
        weight = 1.0 if module_weight is None else module_weight(module)
        if weight:
            _add_module(products, readers, module, members, dtype, weight)
    return products + np.triu(products, 1).T


def _add_module(
    products: np.ndarray,
    readers: Sequence[FactorReader],
    module: str,
    members: list[int],
    dtype: torch.dtype,
    weight: float,
) -> None:
    """Add one module's products, times its weight, to the upper triangle."""
    outlines = [readers[member].outline.factors[module] for member in members]
    ranks = [outline.lora_A.shape[0] for outline in outlines]
    blocks = _blocks(members, ranks)
    size = sum(ranks) * (outlines[0].lora_A.shape[1] + outlines[0].lora_B.shape[0]) * dtype.itemsize
    stack = lru_cache(len(blocks) if size <= MODULE_BYTES else 2)(
        lambda number: _stack(readers, module, blocks[number], dtype)
    )
    for first, rows in enumerate(blocks):
        for second in range(first, len(blocks)):
            row_A, row_B, row_starts, row_scales = stack(first)
            column_A, column_B, column_starts, column_scales = stack(second)
            entries = ((row_A @ column_A.T) * (row_B.T @ column_B)).numpy().astype(np.float64, copy=False)
            sums = np.add.reduceat(np.add.reduceat(entries, row_starts, axis=0), column_starts, axis=1)
            sums *= weight * np.outer(row_scales, column_scales)
            products[np.ix_(rows, blocks[second])] += np.triu(sums) if second == first else sums


def _blocks(members: list[int], ranks: list[int]) -> list[list[int]]:
    blocks: list[list[int]] = [[]]
    total = 0
    for member, rank in zip(members, ranks, strict=True):
        if blocks[-1] and total + rank > BLOCK_RANKS:
            blocks.append([])
            total = 0
        blocks[-1].append(member)
        total += rank
    return blocks


def _stack(readers: Sequence[FactorReader], module: str, members: list[int], dtype: torch.dtype):
    """A stacked (sum of r, I), B side by side (O, sum of r), where each adapter starts, and the scalings."""
    factors = [readers[member][module] for member in members]
    starts = np.cumsum([0, *(factor.lora_A.shape[0] for factor in factors[:-1])])
    stacked_A = torch.cat([factor.lora_A.detach().cpu().to(dtype) for factor in factors])
    stacked_B = torch.cat([factor.lora_B.detach().cpu().to(dtype) for factor in factors], dim=1)
    return stacked_A, stacked_B, starts, np.array([factor.scaling for factor in factors])


def near_duplicates(
    names: Sequence[str], products: np.ndarray, threshold: float = SAME_COSINE
) -> tuple[NearDuplicate, ...]:
    """The pairs whose updates have a cosine of at least `threshold`, the closest first.

    Args:
        names (`Sequence[str]`): of the N adapters.
        products (`np.ndarray`): (N, N), of `delta_products`.
        threshold (`float`): between 0 and 1. An update that is only longer has cosine 1 and a distance above 0.
    """
    lengths = np.sqrt(np.diag(products))
    safe = np.where(lengths > 0, lengths, 1.0)
    cosines = products / np.outer(safe, safe)
    found = []
    for first, second in np.argwhere(np.triu(cosines >= threshold, 1)):
        gap = products[first, first] + products[second, second] - 2 * products[first, second]
        distance = float(np.sqrt(max(gap, 0.0)) / max(lengths[first], lengths[second]))
        cosine = float(min(cosines[first, second], 1.0))
        found.append(NearDuplicate(names[first], names[second], cosine, distance))
    return tuple(sorted(found, key=lambda pair: (pair.distance, pair.first, pair.second)))
