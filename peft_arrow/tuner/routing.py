"""From the inputs of a layer to the experts of each token: the part of a layer that asks its router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch

from ..ops import ExpertBank, is_materialised
from ..routers import Router, Routing
from .batch_rows import batch_rows
from .merged import MergedRows, merge_rows
from .norms import core_lengths, norm_cores
from .prototypes import dot_float32


# Rows whose chosen experts are put together for decoding; more would take more memory than it saves time.
MERGED_ROWS = 8
# Rows of A at a time that are brought from where paged experts rest, for routers that need all of them.
PAGED_RANKS = 512


class LayerView:
    """What a router may look at: one layer in one call, see [`peft_arrow.routers.LayerInput`]."""

    def __init__(self, layer: RoutingMixin, adapter_name: str, x_TI: torch.Tensor) -> None:
        self._layer, self._adapter_name = layer, adapter_name
        self.x_TI = x_TI
        self.num_experts = len(layer.experts[adapter_name].positions)
        self.module = layer.module_name

    def project(self) -> torch.Tensor:
        """x . v_i, float32 (T, E)."""
        return self._layer.project(self._adapter_name, self.x_TI)

    def norms(self, kind: str) -> torch.Tensor:
        """|V_i^T x| (`"projection"`) or |s_i B_i A_i x| (`"activation"`), float32 (T, E)."""
        return self._layer.lengths(self._adapter_name, self.x_TI, kind)

    def fitted(self, x_TI: torch.Tensor) -> torch.Tensor:
        """Dot products of `x_TI` with what `fit_router` stored, float32 (T, E)."""
        router = self._layer.routers[self._adapter_name]
        return self._layer.stored_rows(router.name)[self._adapter_name](x_TI)


class RoutingMixin:
    """The part of a layer that scores and chooses."""

    def raw_logits(self, adapter_name: str, x_TI: torch.Tensor) -> torch.Tensor:
        """Router logits, float32 (T, E), before calibration."""
        router = self.routers[adapter_name]
        if router.uses_prototypes:
            self.check_prototypes(adapter_name)
        return router.score(LayerView(self, adapter_name, x_TI))

    def calibrated_logits(self, adapter_name: str, x_TI: torch.Tensor) -> torch.Tensor:
        """Router logits, float32 (T, E), standardised by the stored mean and spread where the router says so."""
        logits_TE = self.raw_logits(adapter_name, x_TI)
        if not self.routers[adapter_name].selection.calibrated:
            return logits_TE
        stored = self.stored_rows("calibration")[adapter_name]
        is_here = is_materialised(stored.weight)  # otherwise a call of the module brings the weight in
        mean_E, spread_E = stored.weight.t() if is_here else stored(torch.eye(2, device=x_TI.device))
        return (logits_TE - mean_E) / spread_E

    def logits(self, adapter_name: str, x_TI: torch.Tensor) -> torch.Tensor:
        """Router logits, float32 (T, E); of tied modules each expert's mean over the modules that it has."""
        peers = self.tied.get(adapter_name, ())
        if len(peers) < 2:
            return self.calibrated_logits(adapter_name, x_TI)
        size = 1 + max(max(peer.experts[adapter_name].positions) for peer in peers)
        sums_TE = torch.zeros(x_TI.shape[0], size, device=x_TI.device)
        counts_E = torch.zeros(size, device=x_TI.device)
        for peer in peers:
            index_E = torch.tensor(peer.experts[adapter_name].positions, device=x_TI.device)
            sums_TE = sums_TE.index_add(1, index_E, peer.calibrated_logits(adapter_name, x_TI))
            counts_E = counts_E.index_add(0, index_E, torch.ones_like(index_E, dtype=counts_E.dtype))
        mine_E = torch.tensor(self.experts[adapter_name].positions, device=x_TI.device)
        return sums_TE[:, mine_E] / counts_E[mine_E]

    def route(self, adapter_name: str, x: torch.Tensor) -> Routing:
        """The experts of each token of x (..., I); scores are float32 whatever the dtype of x and autocast say."""
        router = self.routers[adapter_name]
        if decides_once(router):
            return self._route_rows(adapter_name, router, x)
        logits_TE = self.logits(adapter_name, x.reshape(-1, x.shape[-1]))
        return router.choose(logits_TE, self._allowed(adapter_name, x.device))

    def _route_rows(self, adapter_name: str, router: Router, x: torch.Tensor) -> Routing:
        """One choice a row of the batch, made at the first call of a request and kept."""
        tokens = x.shape[:-1].numel()
        request = None if self.requests is None else self.requests.current
        key = (adapter_name, self.module_name)
        decided = None if request is None or request.is_first else request.decided.get(key)
        if decided is None:
            allowed_E = self._allowed(adapter_name, x.device)
            decided = router.choose(self._row_logits(adapter_name, router, x, request), allowed_E)
            if request is not None:
                request.decided[key] = decided.detach()
        rows = decided.top_k_index.shape[0]
        if tokens % rows:
            raise ValueError(
                f"{self.module_name} got {tokens} tokens for a request of {rows} rows; with one choice a request its "
                "inputs must keep the batch dimension, and the batch its size."
            )
        return decided.rows(tokens // rows)

    def _row_logits(self, adapter_name: str, router: Router, x: torch.Tensor, request) -> torch.Tensor:
        """Router logits of each row, float32 (B, E): the mean over its deciding tokens, or the prompt's."""
        if router.is_prompt_level:
            known = None if request is None else request.prompt_logits.get(adapter_name)
            if known is None:
                return router.score(LayerView(self, adapter_name, x.reshape(-1, x.shape[-1])))
            return known[:, torch.tensor(self.experts[adapter_name].positions, device=known.device)].to(x.device)
        if x.dim() != 3:
            raise ValueError(
                f"{self.module_name} gets inputs of shape {tuple(x.shape)}; granularity='sequence' needs (batch, "
                "tokens, features)."
            )
        logits_TE = self.logits(adapter_name, x.reshape(-1, x.shape[-1]))
        # an expert that a router leaves out at a token counts there with 0, the least that a length can be
        logits_BSE = logits_TE.nan_to_num(neginf=0.0).reshape(*x.shape[:-1], -1)
        mask_BS = None if request is None else request.mask_BS
        if mask_BS is None or mask_BS.shape != x.shape[:-1]:
            return logits_BSE.mean(1)
        weights_BS1 = mask_BS.to(logits_BSE).unsqueeze(-1)
        return (logits_BSE * weights_BS1).sum(1) / weights_BS1.sum(1).clamp_min(1.0)

    def pinned(self, adapter_name: str, x: torch.Tensor, pins: Sequence[Mapping[int, float]]) -> Routing:
        """Row b goes to the experts of `pins[b]` (position in the model -> weight) that have this module."""
        positions = self.experts[adapter_name].positions
        tokens = x.shape[:-1].numel()
        if tokens % len(pins):
            raise ValueError(f"{self.module_name} got {tokens} tokens for {len(pins)} rows of pinned experts.")
        places = {position: e for e, position in enumerate(positions)}
        rows = [[(places[p], w) for p, w in row.items() if p in places] for row in pins]
        width = max(1, *(len(row) for row in rows))
        padded = [row + [(-1, 0.0)] * (width - len(row)) for row in rows]
        index_BK = torch.tensor([[e for e, _ in row] for row in padded], device=x.device)
        weights_BK = torch.tensor([[w for _, w in row] for row in padded], dtype=torch.float32, device=x.device)
        return Routing(index_BK, weights_BK).rows(tokens // len(pins))

    def merged_rows(self, adapter_name: str, x: torch.Tensor) -> MergedRows | None:
        """While a request is decoded: the experts that were chosen for each row, as one LoRA; None where not."""
        router, request = self.routers[adapter_name], None if self.requests is None else self.requests.current
        if request is None or request.is_first or not decides_once(router) or torch.is_grad_enabled():
            return None
        key = (adapter_name, self.module_name)
        decided = request.decided.get(key)
        if decided is None or x.dim() != 3 or x.shape[0] != len(decided.top_k_index) or len(x) > MERGED_ROWS:
            return None
        if key not in request.merged:
            weights = [weight for bank in self._bank_weights(adapter_name).values() for weight in bank]
            request.merged[key] = None
            if is_materialised(*weights):
                scale, scalings = self.scales[adapter_name], self.experts[adapter_name].scalings
                factors = self.expert_factors(adapter_name)
                scalings = [scaling * scale for scaling in scalings]
                aggregation = self.aggregations[adapter_name]
                request.merged[key] = merge_rows(decided, factors, scalings, aggregation, x.device)
        return request.merged[key]

    def lengths(self, adapter_name: str, x_TI: torch.Tensor, kind: str) -> torch.Tensor:
        """|V_i^T x| or |s_i B_i A_i x| of each expert, float32 (T, E)."""
        cores = self._cores(adapter_name, kind)
        pieces: dict[int, torch.Tensor] = {}
        for bank in self.stack(adapter_name, x_TI.device).banks:
            pieces.update(zip(bank.experts, _shrunk(x_TI, bank).split(bank.ranks, dim=-1), strict=True))
        with torch.autocast(x_TI.device.type, enabled=False):
            return core_lengths([pieces[e] for e in range(len(pieces))], cores)

    def _cores(self, adapter_name: str, kind: str) -> list[torch.Tensor]:
        """The norm cores of the current weights, kept until they change."""
        kept = self.cores.setdefault(adapter_name, {})
        now = None if torch.compiler.is_compiling() else self._weights_now(adapter_name)
        if kind not in kept or (now is not None and kept[kind][0] != now):
            with torch.inference_mode(False):
                factors = self.expert_factors(adapter_name)
                cores = norm_cores(factors, self.experts[adapter_name].scalings, kind)
                cores = [core.to(self.arrow_lora_router[adapter_name].weight.device) for core in cores]
            kept[kind] = (now, cores)
        return kept[kind][1]

    def _allowed(self, adapter_name: str, device: torch.device) -> torch.Tensor | None:
        """bool (E,), False for a masked expert; None where none is masked."""
        masked = self.masked.get(adapter_name, frozenset())
        positions = self.experts[adapter_name].positions
        if masked.isdisjoint(positions):
            return None
        if torch.compiler.is_compiling():
            return _mask(positions, masked, device)
        kept, key = self.cores.setdefault(adapter_name, {}), ("allowed", masked, device)
        if key not in kept:
            with torch.inference_mode(False):
                kept[key] = _mask(positions, masked, device)
        return kept[key]

    def _mixed_batch(self, x: torch.Tensor, result: torch.Tensor, row_targets: list) -> torch.Tensor:
        """Row b of the batch goes through `row_targets[b]`: (adapter, None), (adapter, expert position), or None."""
        if len(row_targets) != x.shape[0]:
            raise ValueError(f"adapter_names has {len(row_targets)} names (times beams) for {x.shape[0]} rows.")
        for target in dict.fromkeys(row_targets):
            if target is None or target[0] not in self.experts:
                continue
            adapter_name, position = target
            positions = self.experts[adapter_name].positions
            if position is not None and position not in positions:
                continue
            if position is None and decides_once(self.routers[adapter_name]):
                raise ValueError(
                    f"adapter_names holds {adapter_name!r}, which chooses once a request; rows of a batch are sent to "
                    "different adapters only with granularity='token' and a router that scores tokens."
                )
            pins = None if position is None else [{position: 1.0}]
            rows = [row for row, wanted in enumerate(row_targets) if wanted == target]
            with batch_rows(rows, len(x)) if self.recorder is not None else nullcontext():
                delta = self.routed_delta(adapter_name, x[rows], pins)
            result = result.index_add(0, torch.tensor(rows, device=x.device), delta.to(result.dtype))
        return result


def decides_once(router: Router) -> bool:
    """Whether a router chooses once a request, and not for each token."""
    return router.is_prompt_level or router.selection.granularity == "sequence"


def _mask(positions: Sequence[int], masked: frozenset[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([position not in masked for position in positions], device=device)


def _shrunk(x_TI: torch.Tensor, bank: ExpertBank) -> torch.Tensor:
    """A x in float32 (T, R), without gradients to A; through the module where its weight is not at hand."""
    weight = bank.lora_A.weight
    if is_materialised(weight):
        pieces_RI = (weight.detach(),) if weight.device == x_TI.device else weight.detach().split(PAGED_RANKS)
        return torch.cat([dot_float32(x_TI, piece_RI.to(x_TI.device)) for piece_RI in pieces_RI], dim=-1)
    return bank.lora_A(x_TI.to(weight.dtype)).float()
