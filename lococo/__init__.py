"""Long texts through language models in a fixed number of key-value slots."""

import importlib
from typing import Any

from lococo.cache.cache import LoCoCoCache
from lococo.compression.base import Compressor, register_compressor
from lococo.compression.fusion import FusionHead as _FusionHead  # noqa: F401, registers the compressor "conv"
from lococo.compression.scores import Score, register_score
from lococo.config import LoCoCoConfig
from lococo.extension.folder import load_extended, merge_extended
from lococo.heads import load_heads, push_heads, save_heads
from lococo.kernels.attention import register_attention
from lococo.metrics import perplexity
from lococo.patch import patch_model, patched, unpatch_model
from lococo.state import is_patched
from lococo.version import __version__

__all__ = [
    "Compressor",
    "LoCoCoCache",
    "LoCoCoConfig",
    "Score",
    "__version__",
    "calibrate",
    "extend_context",
    "is_patched",
    "load_extended",
    "load_heads",
    "merge_extended",
    "patch_model",
    "patched",
    "perplexity",
    "push_heads",
    "register_attention",
    "register_compressor",
    "register_score",
    "save_heads",
    "unpatch_model",
]


# Training needs packages that reading does not (accelerate, datasets, peft): they are imported when it is asked for.
_ON_DEMAND = {
    "calibrate": "lococo.training.calibrate",
    "extend_context": "lococo.extension.extend",
}


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        return getattr(importlib.import_module(_ON_DEMAND[name]), name)
    raise AttributeError(f"module 'lococo' has no attribute {name!r}")
