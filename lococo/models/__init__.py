"""What differs per family of models: which layers to patch, how they are called, how their keys are rotated."""

from lococo.models.chatglm.family import RemoteChatGLM
from lococo.models.family import Family, base_config, base_shape, find_family, register_family
from lococo.models.transformers import TransformersFamily, length_dependent_rotaries

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
