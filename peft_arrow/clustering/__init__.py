"""Adapters -> how alike their updates are -> clusters -> fewer experts."""
