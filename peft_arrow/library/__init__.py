"""Experts on disk and on the Hub."""

from .adapter import Adapter, AdapterRef


__all__ = ["Adapter", "AdapterRef"]
