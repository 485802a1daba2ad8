"""Measuring what a compression costs and gains."""

from lococo.evaluation.likelihood import Window, perplexity, token_nlls, windows

__all__ = ["Window", "perplexity", "token_nlls", "windows"]
