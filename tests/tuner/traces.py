"""Traces made by hand: every index and weight is known before the trace is."""

from __future__ import annotations

import torch

from peft_arrow.tuner.trace import ModuleTrace, RoutingTrace, TokenInputs, TraceStep


def inputs(ids=None, mask=None, tasks=None, continues=None, ended=None, stream=""):
    as_tensor = lambda value: None if value is None else torch.tensor(value)  # noqa: E731
    return TokenInputs(as_tensor(ids), as_tensor(mask), tasks, stream, as_tensor(ended), continues)


def module(index, weights, given=None, candidates=(0, 1, 2)):
    return ModuleTrace(torch.tensor(index), torch.tensor(weights, dtype=torch.float32), (), candidates, given)


def step(modules):
    return TraceStep(modules=modules)


def trace_of(*steps, names=("a", "b", "c")):
    trace = RoutingTrace(list(names))
    trace.steps = list(steps)
    return trace


class Tokenizer:
    """Texts of ids 5, 6 and 7."""

    texts = {5: "<b>", 6: " & more\n", 7: "x"}

    def decode(self, ids):
        return "".join(self.texts[token] for token in ids)


def two_rows(tasks=None):
    """Two rows of two tokens, the first of row 2 is padding; expert c is never chosen in layer 0."""
    given = inputs([[5, 6], [0, 7]], [[1, 1], [0, 1]], tasks)
    first = module([[[0, 1], [0, 1]], [[1, 2], [0, 1]]], [[[0.75, 0.25], [1.0, 0.0]], [[0.5, 0.5], [0.5, 0.5]]], given)
    last = module(
        [[[2, -1], [2, -1]], [[0, -1], [2, -1]]], [[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]], given, (2,)
    )
    return trace_of(step({"model.layers.0.self_attn.q_proj": first, "model.layers.1.mlp.up_proj": last}))
