"""Longer windows by a little training."""
