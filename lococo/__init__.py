"""Long texts through language models in a fixed number of key-value slots."""

from typing import Any

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
    "calibrate",
    "is_patched",
    "load_heads",
    "patch_model",
    "patched",
    "perplexity",
    "push_heads",
    "save_heads",
    "unpatch_model",
]


def __getattr__(name: str) -> Any:
    # Calibration needs packages that reading does not (accelerate, datasets): they are imported when it is asked for.
    if name == "calibrate":
        from lococo.training.calibrate import calibrate

        return calibrate
    raise AttributeError(f"module 'lococo' has no attribute {name!r}")
