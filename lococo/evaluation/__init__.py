"""Measuring what a compression costs and gains."""

from lococo.data.texts import Window, sliding_windows, windows
from lococo.metrics import perplexity, token_nlls

__all__ = ["Window", "perplexity", "sliding_windows", "token_nlls", "windows"]
