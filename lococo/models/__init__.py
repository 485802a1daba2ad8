"""What differs per model family: which layers to patch, and how a layer's keys are rotated."""

from lococo.models.base import (
    attention_layers,
    base_config,
    base_shape,
    find_decoder,
    rotary_embedding,
    uses_rotary,
)

__all__ = [
    "attention_layers",
    "base_config",
    "base_shape",
    "find_decoder",
    "rotary_embedding",
    "uses_rotary",
]
