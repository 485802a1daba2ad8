"""Positions beyond those a model was trained on: its rotary embedding stretched."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn

from lococo.models import find_family

ROPE_TYPES = ("linear", "yarn", "dynamic")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How positions of a longer text are mapped to those a model knows.

    Parameters
    ----------
    factor : float
        New length / old length.
    original_length : int
        Tokens that the model was trained on at once.
    rope_type : {"linear", "yarn", "dynamic"}
        "linear": every position divided by the factor (Chen et al. 2023, positional interpolation); "yarn" (Peng et
        al. 2023): slow frequencies divided, fast ones kept; "dynamic": a base that grows with the longest text read
        so far, so that keys already in a cache stay as they were rotated.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    factor: float
    original_length: int
    rope_type: str = "linear"

    def __post_init__(self) -> None:
        if not isinstance(self.factor, int | float) or not 1 <= self.factor < float("inf"):
            raise ValueError(f"factor must be at least 1 (new length / old length), got {self.factor!r}")
        if not isinstance(self.original_length, int) or self.original_length < 1:
            raise ValueError(f"original_length must be a whole number of at least 1, got {self.original_length!r}")
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type must be one of {', '.join(ROPE_TYPES)}, got {self.rope_type!r}")

    @property
    def length(self) -> int:
        """Tokens of the longer texts."""
        return round(self.original_length * self.factor)


def scale_positions(model: nn.Module, scaling: RopeScaling) -> nn.Module:
    """Give a model a rotary embedding for longer texts, and a config that says so. Returns the model.

    Parameters
    ----------
    model : torch.nn.Module
        A Transformers decoder with rotary positions.

    Raises
    ------
    ValueError
        If the model's positions cannot be stretched; says why. The model is then as it was.
    """
    family, name = find_family(model), type(model).__name__
    decoder = family.decoder
    if family.instead is not None:
        raise ValueError(f"{name} in code of its own cannot be extended: {family.instead}")
    rotary: Any = getattr(decoder, "rotary_emb", None)
    if [module for module in decoder.modules() if hasattr(module, "inv_freq")] != [rotary]:
        raise ValueError(f"{name} cannot be extended: its layers do not share one rotary embedding")
    changes = _changes(name, decoder.config, scaling)
    config = copy.deepcopy(decoder.config)
    _update(config, changes)
    try:
        type(config).from_dict(config.to_dict())  # as a saved model is loaded
    except Exception as error:  # of a kind of their own in every release
        raise ValueError(
            f"{name} cannot be extended with rope_type={scaling.rope_type!r}: its config does not take it ({error})"
        ) from error
    device = rotary.inv_freq.device
    longer = type(rotary)(config).to(torch.device("cpu") if device.type == "meta" else device)
    longer.train(rotary.training)
    _update(decoder.config, changes)
    longer.config = decoder.config
    decoder.rotary_emb = longer
    return model


def _changes(name: str, config: Any, scaling: RopeScaling) -> dict[str, Any]:
    """Fields of a decoder's config for a scaling, as the installed Transformers calls them."""
    field = "rope_parameters" if getattr(config, "rope_parameters", None) else "rope_scaling"
    rope = dict(getattr(config, field, None) or {})
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"{name} cannot be extended: its layers rotate in {len(rope)} different ways")
    rope_type, factor = rope.get("rope_type", rope.get("type", "default")), scaling.factor
    if rope_type == "linear" == scaling.rope_type:
        factor *= rope["factor"]
    elif rope_type != "default":
        raise ValueError(
            f"{name} cannot be extended with rope_type={scaling.rope_type!r}: its positions are already stretched "
            f"with {rope_type!r}"
        )
    rope.pop("type", None)
    rope.update(rope_type=scaling.rope_type, factor=float(factor))
    if scaling.rope_type == "yarn":
        rope["original_max_position_embeddings"] = scaling.original_length
    # "dynamic" reads the length that the model was trained on where others have the new one.
    changes = {field: rope, "max_position_embeddings": scaling.length}
    if scaling.rope_type == "dynamic":
        changes["max_position_embeddings"] = scaling.original_length
    elif hasattr(config, "original_max_position_embeddings"):  # Phi-3, there it comes first
        changes["original_max_position_embeddings"] = scaling.original_length
    return changes


def _update(config: Any, changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        setattr(config, name, copy.deepcopy(value))
