"""The model-card templates render to a card that the Hub's own reader accepts."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard, ModelCardData

from peft_arrow.cards import card_folder, card_template


VARIABLES = {
    "model_name": "my-routed-model",
    "model_id": "me/my-routed-model",
    "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "auto_class": "AutoModelForCausalLM",
    "experts": [
        {"name": "plurals", "rank": "4", "modules": 60, "source": "me/plurals@main"},
        {"name": "dates", "rank": "4-16", "modules": 30, "source": None},
    ],
    "routing": {"router": "arrow", "top_k": 2, "router_temperature": 1.0, "aggregation": "output"},
    "versions": {"peft-arrow": "0.1.0", "PEFT": "0.21.2"},
    "description": None,
}


def test_routed_model_card():
    data = ModelCardData(base_model=VARIABLES["base_model"], library_name="peft", tags=["peft-arrow"])
    card = ModelCard.from_template(data, template_path=str(card_template("routed_model.md")), **VARIABLES)
    again = ModelCard(str(card))
    assert again.data.base_model == VARIABLES["base_model"] and again.data.tags == ["peft-arrow"]
    assert "import peft_arrow" in card.text and 'PeftModel.from_pretrained(base, "me/my-routed-model")' in card.text
    assert "| plurals | 4 | 60 | me/plurals@main |" in card.text
    assert "| dates | 4-16 | 30 | not recorded |" in card.text
    assert "| `top_k` | `2` |" in card.text and "- PEFT 0.21.2" in card.text
    assert "{{" not in card.text and "None" not in card.text


def test_unknown_template_is_named():
    with pytest.raises(FileNotFoundError, match=r"'nothing.md'.*routed_model.md"):
        card_template("nothing.md")
    assert card_folder().is_dir()
