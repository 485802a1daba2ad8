"""Where Transformers releases differ.

Before 4.56 much is missing; there only ChatGLM's own code is patched, which runs whole nowhere else. From 5.24 on a
model's ``past_key_values`` is called ``cache``, as argument and in outputs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import transformers
from torch import nn
from transformers import PreTrainedModel, cache_utils

OLDEST = "4.56"
RELEASE = tuple(map(int, transformers.__version__.split(".")[:2]))
HAS_ATTENTION_INTERFACE = RELEASE >= (4, 56)

OLD_CACHE_NAME, CACHE_NAME = "past_key_values", "cache"
OUTPUT_CACHE = CACHE_NAME if RELEASE >= (5, 24) else OLD_CACHE_NAME

if TYPE_CHECKING or HAS_ATTENTION_INTERFACE:
    from transformers import AttentionInterface, masking_utils
    from transformers.cache_utils import Cache, CacheLayerMixin
    from transformers.masking_utils import AttentionMaskInterface
else:

    class AttentionInterface:
        """Nowhere to register: ChatGLM's own layers are bridged."""

        @staticmethod
        def register(name, function):
            """Nothing."""

    AttentionMaskInterface = AttentionInterface
    masking_utils = None

    class CacheLayerMixin:
        """Nothing in common with other layers."""

    class Cache(cache_utils.Cache):
        """A cache as a list of layers."""

        def __init__(self, layers):
            self.layers = layers

        def get_seq_length(self, layer_idx=0):
            """Tokens held."""
            return self.layers[layer_idx].get_seq_length()

        def reset(self):
            """Forget everything."""
            for layer in self.layers:
                layer.reset()

        def reorder_cache(self, beam_idx):
            """Row i becomes row ``beam_idx[i]``."""
            for layer in self.layers:
                layer.reorder_cache(beam_idx)

        def batch_repeat_interleave(self, repeats):
            """Every row ``repeats`` times."""
            for layer in self.layers:
                layer.batch_repeat_interleave(repeats)

        def batch_select_indices(self, indices):
            """Only the rows named."""
            for layer in self.layers:
                layer.batch_select_indices(indices)


@functools.lru_cache
def argument_names(forward: Callable) -> list[str]:
    """Names of a forward's arguments in order."""
    return [name for name in inspect.signature(forward).parameters if name != "self"]


def cache_argument(model: nn.Module) -> str:
    """What the forward of a model, or of the first Transformers model inside it, calls its cache.

    A release tells it only of its own models: ChatGLM's own code keeps the old name.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return CACHE_NAME if CACHE_NAME in argument_names(type(module).forward) else OLD_CACHE_NAME
    return OUTPUT_CACHE


def with_cache(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The cache as keyword argument of ``model(...)`` and ``model.generate(...)``."""
    return {cache_argument(model): cache}


def cache_of(output: Any) -> Any:
    """The cache in a model's output."""
    return getattr(output, OUTPUT_CACHE)


__all__ = [
    "CACHE_NAME",
    "HAS_ATTENTION_INTERFACE",
    "OLDEST",
    "OLD_CACHE_NAME",
    "OUTPUT_CACHE",
    "AttentionInterface",
    "AttentionMaskInterface",
    "Cache",
    "CacheLayerMixin",
    "argument_names",
    "cache_argument",
    "cache_of",
    "masking_utils",
    "with_cache",
]
