"""Other ways of running a prefill: torch.compile, and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .side import Side


def compiled(side: Side, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A compiled prefill of `ids`, compiled already. Prototypes must be built, as `routed_model` does."""
    side.prepare()
    # all sides compile the same functions of transformers; beyond the limit they would run as they are, in silence
    torch._dynamo.config.recompile_limit = 256
    model = torch.compile(side.model, dynamic=False)

    @torch.no_grad()
    def run() -> torch.Tensor:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]

    run()
    return run


@torch.no_grad()
def captured(side: Side, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A prefill of `ids` captured into a CUDA graph, after three runs on a side stream as capturing asks for."""
    side.prepare()

    def forward() -> torch.Tensor:
        return side.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = forward()

    def run() -> torch.Tensor:
        graph.replay()
        return logits

    return run


MODES: dict[str, Callable[[Side, torch.Tensor], Callable[[], torch.Tensor]] | None] = {
    "as is": None,
    "torch.compile": compiled,
    "CUDA graph": captured,
}
