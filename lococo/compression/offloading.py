"""Learned parts of layers whose weights accelerate keeps elsewhere between two forwards."""

import contextlib

from torch import nn


def onloaded(module: nn.Module) -> contextlib.AbstractContextManager:
    """Context in which weights that accelerate offloads between the forwards of their module are there."""
    if not hasattr(module, "_hf_hook"):
        return contextlib.nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)
