"""Where the model-card templates are, in a wheel and in a clone."""

from __future__ import annotations

from pathlib import Path


_PACKAGED = Path(__file__).parent / "hub_cards"
_CLONED = Path(__file__).parent.parent / "hub_cards"


def card_folder() -> Path:
    """Return the folder of the templates: inside the package in a wheel, beside it in a clone."""
    return _PACKAGED if _PACKAGED.is_dir() else _CLONED


def card_template(name: str) -> Path:
    """Return the path of the Jinja template `name`, such as `"routed_model.md"`.

    Raises:
        FileNotFoundError: there is no such template; the message lists those there are.
    """
    path = card_folder() / name
    if not path.is_file():
        known = sorted(file.name for file in card_folder().glob("*.md"))
        raise FileNotFoundError(f"card template {name!r} is not in {card_folder()}; there are: {known}.")
    return path
