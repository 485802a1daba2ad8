"""The name of a model by its weights and its config, to tell it from another that was in the same place."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn

from lococo.models import base_config
from lococo.state import is_ours

SAMPLED = 64  # numbers of a parameter, about
# Fields of a config that change nothing that is computed.
NOT_COMPUTED_WITH = {"_name_or_path", "architectures", "transformers_version", "use_cache"}


def model_digest(model: nn.Module) -> str:
    """SHA256 of a model's config, and the types and some numbers of its parameters that are in memory, without heads.

    Raises
    ------
    ValueError
        If there is no Transformers model in it.
    """
    found = hashlib.sha256(config_text(model).encode())
    for name, parameter in model.named_parameters():
        weights = parameter.data
        if not is_ours(name) and type(weights) is torch.Tensor and not weights.is_meta:
            some = weights.flatten()[:: max(1, weights.numel() // SAMPLED)]
            found.update(f"{name} {weights.dtype}".encode() + some.double().cpu().numpy().tobytes())
    return found.hexdigest()


def config_text(model: nn.Module) -> str:
    """What the config of a model says of how it computes."""
    fields = base_config(model).to_diff_dict()
    said = {name: value for name, value in fields.items() if name not in NOT_COMPUTED_WITH}
    return json.dumps(said, sort_keys=True, default=str)
