"""What differs per family of models: which layers to patch, how they are called, how their keys are rotated."""

from lococo.models.family import Family, base_config, base_shape, find_family, register_family
from lococo.models.transformers import TransformersFamily, length_dependent_rotaries

from lococo.models.chatglm.family import RemoteChatGLM  # isort: skip, asked before the family registered first

__all__ = [
    "Family",
    "RemoteChatGLM",
    "TransformersFamily",
    "base_config",
    "base_shape",
    "find_family",
    "length_dependent_rotaries",
    "register_family",
]
