"""Texts through a routed model, and what the router did with them. `peft-arrow route` is the command."""

from .load import RoutedSource
from .run import RoutedTexts, route_texts
from .texts import Text, read_fit_data, read_texts


__all__ = ["RoutedSource", "RoutedTexts", "Text", "read_fit_data", "read_texts", "route_texts"]
