"""Long texts through language models in a fixed number of key-value slots."""

from lococo.cache import LoCoCoCache
from lococo.config import LoCoCoConfig
from lococo.evaluation.likelihood import perplexity
from lococo.heads import load_heads, push_heads, save_heads
from lococo.patch import patch_model, patched, unpatch_model
from lococo.state import is_patched
from lococo.version import __version__

__all__ = [
    "LoCoCoCache",
    "LoCoCoConfig",
    "__version__",
    "is_patched",
    "load_heads",
    "patch_model",
    "patched",
    "perplexity",
    "push_heads",
    "save_heads",
    "unpatch_model",
]
