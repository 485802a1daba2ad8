"""What Transformers before 4.56 lacks. There only ChatGLM's own code is patched, which runs whole nowhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import transformers
from transformers import cache_utils

OLDEST = "4.56"
HAS_ATTENTION_INTERFACE = tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56)

if TYPE_CHECKING or HAS_ATTENTION_INTERFACE:
    from transformers import AttentionInterface
    from transformers.cache_utils import Cache, CacheLayerMixin
    from transformers.masking_utils import AttentionMaskInterface
else:

    class AttentionInterface:
        """Nowhere to register: ChatGLM's own layers are bridged."""

        @staticmethod
        def register(name, function):
            """Nothing."""

    AttentionMaskInterface = AttentionInterface

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


__all__ = [
    "HAS_ATTENTION_INTERFACE",
    "OLDEST",
    "AttentionInterface",
    "AttentionMaskInterface",
    "Cache",
    "CacheLayerMixin",
]
