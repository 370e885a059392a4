"""The head of a CPU training: labelled positions alone are scored, and nothing else changes."""

from __future__ import annotations

import contextlib

import pytest
import torch
from safetensors.torch import load_file
from trl.trainer import utils as trl_utils

from peft_arrow import train_adapter
from peft_arrow.training import fitting
from tests.pico import pico_base, pico_tokenizer


ROWS = [{"prompt": f"{letter * 9}:", "completion": f" {letter}"} for letter in "abcd"]
QUICK = {"learning_rate": 0.01, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_length": 32}


def trained(folder):
    ref = train_adapter(
        pico_base(), ROWS, output_dir=folder, steps=3, sft_config=QUICK, tokenizer=pico_tokenizer(), progress=False
    )
    return load_file(ref.source / "adapter_model.safetensors")


@pytest.fixture
def scored(monkeypatch):
    """How many positions the head has scored, a number a call."""
    counts, own = [], trl_utils._ChunkedLogProbFunction

    class Counting:
        @staticmethod
        def apply(hidden, *rest):
            counts.append(hidden.shape[0])
            return own.apply(hidden, *rest)

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Counting)
    return counts


def test_labels_alone_are_scored_with_the_same_result(tmp_path, scored, monkeypatch):
    """Four rows of two answer tokens and an end token; TRL by itself scores all positions but the last."""
    ours = trained(tmp_path / "ours")
    assert scored == [4 * 3] * 3
    monkeypatch.setattr(fitting, "scoring_labels_only", contextlib.nullcontext)
    theirs = trained(tmp_path / "theirs")
    assert scored[3:] == [4 * 12] * 3
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-6)


def test_the_switch_is_put_back(tmp_path):
    before = trl_utils._use_triton
    trained(tmp_path / "one")
    assert trl_utils._use_triton is before
    with pytest.raises(RuntimeError, match="inside"), fitting.scoring_labels_only():
        raise RuntimeError("inside")
    assert trl_utils._use_triton is before


def test_a_trl_without_the_switch_is_left_alone(monkeypatch):
    monkeypatch.delattr(trl_utils, "_use_triton")
    with fitting.scoring_labels_only():
        assert not hasattr(trl_utils, "_use_triton")
