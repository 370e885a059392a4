"""Patterns of strangers: those people write are taken, those that could run for ever are refused."""

from __future__ import annotations

import re

import pytest

from peft_arrow.library.patterns import check_pattern


NAME = "model.layers.10.self_attn.q_proj"
WRITTEN = [
    "q_proj",
    r".*\.(q_proj|v_proj)",
    r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
    r".*layers\.(0|1|2[0-9]?)\..*(attn|mlp).*",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|mlp).*?(?:q_proj|k_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:up_proj))",
    r"^(?!.*lm_head).*proj$",
]
HOSTILE = [
    r"(\w+\.?)+!",
    r"(a+)+$",
    r"((.*)*)*x",
    r"(.|\w)*!",
    r"(?:(?:.*_)+.*)+!",
    r"(.*){30}!",
    ".*" * 30 + "!",
    r"(.{0,20}){0,20}!",
]


@pytest.mark.parametrize("pattern", WRITTEN)
def test_what_people_write(pattern):
    check_pattern(pattern)


@pytest.mark.parametrize("pattern", HOSTILE)
def test_what_would_not_end(pattern):
    with pytest.raises(ValueError, match="can take for ever"):
        check_pattern(pattern)


@pytest.mark.parametrize(
    "pattern", ["(", "[", "a{2,1}", "*", "(" * 3000, "(" * 500, "a{99999999999999999999}", "(?P<x>)(?P<x>)"]
)
def test_what_is_no_pattern(pattern):
    with pytest.raises(ValueError, match=r"no regular expression|at most 2000"):
        check_pattern(pattern)


def test_the_worst_that_is_taken():
    """The most repeats in a row still end in a moment."""
    pattern = ".*" * 6 + "!"
    check_pattern(pattern)
    assert re.fullmatch(pattern, NAME) is None
