"""The name of a model by its weights, to tell it from another that was in the same place."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from lococo.state import is_ours

SAMPLED = 64  # numbers of a parameter, about


def model_digest(model: nn.Module) -> str:
    """SHA256 of the types and some numbers of every parameter of its own, heads left out, that is in memory."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        weights = parameter.data
        if not is_ours(name) and type(weights) is torch.Tensor and not weights.is_meta:
            some = weights.flatten()[:: max(1, weights.numel() // SAMPLED)]
            found.update(f"{name} {weights.dtype}".encode() + some.double().cpu().numpy().tobytes())
    return found.hexdigest()
