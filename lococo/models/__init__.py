"""What differs per model family: which layers to patch, and how a layer's keys are rotated."""

from lococo.models.transformers import (
    apply_rotary,
    attention_layers,
    base_config,
    base_shape,
    find_decoder,
    layer_head_dim,
    length_dependent_rotaries,
    rotary_embedding,
    uses_rotary,
)

__all__ = [
    "apply_rotary",
    "attention_layers",
    "base_config",
    "base_shape",
    "find_decoder",
    "layer_head_dim",
    "length_dependent_rotaries",
    "rotary_embedding",
    "uses_rotary",
]
