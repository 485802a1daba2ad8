"""Read long texts with language models in a fixed number of key-value slots."""

import importlib
from typing import TYPE_CHECKING, Any

from lococo.version import __version__

if TYPE_CHECKING:
    from lococo.cache.cache import LoCoCoCache as LoCoCoCache
    from lococo.compression.base import Compressor as Compressor
    from lococo.compression.base import register_compressor as register_compressor
    from lococo.compression.scores import Score as Score
    from lococo.compression.scores import register_score as register_score
    from lococo.config import LoCoCoConfig as LoCoCoConfig
    from lococo.extension.extend import extend_context as extend_context
    from lococo.extension.folder import load_extended as load_extended
    from lococo.extension.folder import merge_extended as merge_extended
    from lococo.generation import cache_bytes as cache_bytes
    from lococo.heads import load_heads as load_heads
    from lococo.heads import push_heads as push_heads
    from lococo.heads import save_heads as save_heads
    from lococo.kernels.attention import register_attention as register_attention
    from lococo.metrics import perplexity as perplexity
    from lococo.patch import patch_model as patch_model
    from lococo.patch import patched as patched
    from lococo.patch import unpatch_model as unpatch_model
    from lococo.state import is_patched as is_patched
    from lococo.training.calibrate import calibrate as calibrate

# Where a name comes from when it is first asked for: the command line shows its help without torch, and reading needs
# none of the packages that training does.
_MODULES = {
    "Compressor": "lococo.compression.base",
    "LoCoCoCache": "lococo.cache.cache",
    "LoCoCoConfig": "lococo.config",
    "Score": "lococo.compression.scores",
    "cache_bytes": "lococo.generation",
    "calibrate": "lococo.training.calibrate",
    "extend_context": "lococo.extension.extend",
    "is_patched": "lococo.state",
    "load_extended": "lococo.extension.folder",
    "load_heads": "lococo.heads",
    "merge_extended": "lococo.extension.folder",
    "patch_model": "lococo.patch",
    "patched": "lococo.patch",
    "perplexity": "lococo.metrics",
    "push_heads": "lococo.heads",
    "register_attention": "lococo.kernels.attention",
    "register_compressor": "lococo.compression.base",
    "register_score": "lococo.compression.scores",
    "save_heads": "lococo.heads",
    "unpatch_model": "lococo.patch",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lococo' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
