"""Gemma 3 rotates its sliding-window layers with a base of their own."""

from __future__ import annotations

from typing import Any


def local_or_global_rotary(decoder: Any, attention: Any) -> Any:
    """The rotary embedding of a Gemma 3 layer where Transformers keeps two (before 5.0), else None."""
    if not hasattr(decoder, "rotary_emb_local"):
        return None
    return decoder.rotary_emb_local if attention.is_sliding else decoder.rotary_emb
