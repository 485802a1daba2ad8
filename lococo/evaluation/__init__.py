"""Measuring what a compression costs and gains."""

from lococo.evaluation.likelihood import perplexity, token_nlls
from lococo.evaluation.texts import Window, sliding_windows, windows

__all__ = ["Window", "perplexity", "sliding_windows", "token_nlls", "windows"]
