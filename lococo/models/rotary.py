"""Rotating keys between positions, in whatever way the model's own code rotates them."""

from __future__ import annotations

from typing import Any

import torch

from lococo.config import LoCoCoConfig
from lococo.models.family import Family, execution_device


class RotaryTable:
    """Cosines and sines of the positions 0 to capacity - 1, and the model's own way to apply them.

    Parameters
    ----------
    family : Family
        Knows the decoder that owns the rotary embedding.
    layer : torch.nn.Module
        An attention layer of it.
    capacity : int
        Number of positions, ``num_slots + block_size``.
    """

    def __init__(self, family: Family, layer: Any, capacity: int, device: torch.device) -> None:
        exact = torch.zeros((), dtype=torch.float32)
        cos, sin = family.rotary(layer, exact, torch.arange(capacity)[None])
        # YaRN and its kin scale queries and keys on the way; a rotation between positions must not scale again.
        scaling = cos[:, :1, :1]
        # (1, capacity, rotary_dim or half of it), float32; the embedding may be on another device than the layer.
        self.cos, self.sin = (cos / scaling).to(device), (sin / scaling).to(device)
        self._apply = family.apply_rotary(layer)
        # A family that rotates in a way of its own fails here, not in the middle of a text.
        self.rotate(
            torch.zeros(1, 1, 1, family.head_dim(layer), device=device),
            torch.zeros(1, 1, dtype=torch.long, device=device),
        )

    def rotate(self, keys: torch.Tensor, positions: torch.Tensor, inverse: bool = False) -> torch.Tensor:
        """Rotate keys from position 0 to ``positions``, or back.

        Parameters
        ----------
        keys : torch.Tensor
            (batch, kv_heads, tokens, head_dim).
        positions : torch.Tensor
            (1 or batch, tokens).
        """
        if self.cos.device != keys.device:  # the model has been moved
            self.cos, self.sin = self.cos.to(keys.device), self.sin.to(keys.device)
        cos, sin = self.cos[0, positions], self.sin[0, positions]
        # In float32, and with one head in the place of the query that the function also wants.
        exact = keys.float()
        _, rotated = self._apply(exact[:, :1], exact, cos, -sin if inverse else sin)
        return rotated.to(keys.dtype)


def rotary_tables(family: Family, config: LoCoCoConfig) -> dict[int, RotaryTable | None]:
    """One table per layer, the same object for layers that rotate alike; None for a layer without positions.

    Raises
    ------
    ValueError
        If the keys of a layer cannot be moved.
    """
    by_type: dict[Any, RotaryTable] = {}
    layer_types = getattr(family.decoder.config, "layer_types", None)
    tables: dict[int, RotaryTable | None] = {}
    for index, layer in family.layers.items():
        if not family.uses_rotary(layer):
            tables[index] = None
            continue
        layer_device = execution_device(layer)
        kind = (layer_types[index] if layer_types else None, layer_device)
        if kind not in by_type:
            try:
                by_type[kind] = RotaryTable(family, layer, config.capacity, layer_device)
            except (AttributeError, KeyError, RuntimeError, TypeError) as error:
                raise ValueError(
                    f"positions='slot' must move keys, those of {type(layer).__name__} cannot be rotated outside its "
                    f"own code ({error!r}); use positions='absolute'"
                ) from error
        tables[index] = by_type[kind]
    return tables
