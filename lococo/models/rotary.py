"""Rotating keys between positions, in whatever way the model's own code rotates them."""

from __future__ import annotations

import abc
from typing import Any

import torch
import torch.nn.functional as F

from lococo.config import LoCoCoConfig
from lococo.models.family import Family, execution_device


class Rotary(abc.ABC):
    """The way in which a model's own code rotates the keys of some of its layers.

    Parameters
    ----------
    family : Family
        Knows the decoder that owns the rotary embedding.
    layer : torch.nn.Module
        An attention layer of it.
    """

    def __init__(self, family: Family, layer: Any) -> None:
        self._apply = family.apply_rotary(layer)
        # A family that rotates in a way of its own fails here, not in the middle of a text.
        device = execution_device(layer)
        key = torch.zeros(1, 1, 1, family.head_dim(layer), device=device)
        self.rotate(key, torch.zeros(1, 1, dtype=torch.long, device=device))

    @abc.abstractmethod
    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, (1 or batch, tokens, rotary_dim or half of it) in float32, of (1 or batch, tokens)."""

    def rotate(self, keys: torch.Tensor, positions: torch.Tensor, inverse: bool = False) -> torch.Tensor:
        """Rotate keys from position 0 to ``positions``, or back.

        Parameters
        ----------
        keys : torch.Tensor
            (batch, kv_heads, tokens, head_dim).
        positions : torch.Tensor
            (1 or batch, tokens).
        """
        cos, sin = self.angles(positions)
        # In float32, and with one head in the place of the query that the function also wants.
        exact = keys.float()
        _, rotated = self._apply(exact[:, :1], exact, cos, -sin if inverse else sin)
        return rotated.to(keys.dtype)


class TextRotary(Rotary):
    """Rotation between any positions of a text, by the model's own rotary embedding."""

    def __init__(self, family: Family, layer: Any) -> None:
        self._family, self._layer = family, layer
        self._last: tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] | None = None
        super().__init__(family, layer)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_last": None}

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Computed once for a call, whose layers ask with the same tensor one after another."""
        last = self._last
        if last is None or last[0] is not positions:
            self._last = last = (positions, self._angles(positions))  # another thread may put its own there
        return last[1]

    def _angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Position 0 in front, where a cosine is the scale of YaRN and its kin alone.
        with_first = F.pad(positions, (1, 0))
        exact = torch.zeros((), dtype=torch.float32, device=positions.device)  # an upload would be waited for
        cos, sin = self._family.rotary(self._layer, exact, with_first)
        scaling = cos[:1, :1, :1]
        return tuple((each[:, 1:] / scaling).to(positions.device) for each in (cos, sin))  # type: ignore[return-value]


class RotaryTable(Rotary):
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

    def __init__(self, family: Family, layer: Any, capacity: int) -> None:
        if family.max_positions is not None and capacity > family.max_positions:
            raise ValueError(
                f"but num_slots + block_size = {capacity} positions are more than the {family.max_positions} of this "
                "model"
            )
        exact = torch.zeros((), dtype=torch.float32)
        cos, sin = family.rotary(layer, exact, torch.arange(capacity)[None])
        # YaRN and its kin scale queries and keys on the way; a rotation between positions must not scale again.
        scaling = cos[:, :1, :1]
        # (1, capacity, rotary_dim or half of it), float32, by device: layers may be moved once the model is patched.
        self._tables = {cos.device: (cos / scaling, sin / scaling)}
        super().__init__(family, layer)

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Looked up."""
        cos, sin = (table[0, positions] for table in self._on(positions.device))
        return cos, sin

    def _on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._tables:
            cos, sin = next(iter(self._tables.values()))
            self._tables[device] = cos.to(device), sin.to(device)
        return self._tables[device]


def rotary_tables(family: Family, config: LoCoCoConfig) -> dict[int, Rotary | None]:
    """What rotates the keys of every layer, the same object for layers that rotate alike, if somebody asks for it.

    Those of ``positions="slot"`` are moved from place to place in the cache, and a score's network sees them as they
    were before they were rotated. None for a layer without positions.

    Raises
    ------
    ValueError
        If the keys of a layer cannot be rotated from outside.
    """
    if config.positions == "slot":
        wanted, remedy = "positions='slot' must move keys", "positions='absolute'"
    elif config.has_features:
        wanted, remedy = f"score={config.score!r} must see keys before they are rotated", "score='distant'"
    else:
        return {}
    by_type: dict[Any, Rotary] = {}
    layer_types = getattr(family.decoder.config, "layer_types", None)
    tables: dict[int, Rotary | None] = {}
    for index, layer in family.layers.items():
        kind = (layer_types[index] if layer_types else None, execution_device(layer))
        try:
            if not family.uses_rotary(layer):
                tables[index] = None
                continue
            if kind not in by_type:
                is_slot = config.positions == "slot"
                by_type[kind] = RotaryTable(family, layer, config.capacity) if is_slot else TextRotary(family, layer)
        except ValueError as error:
            raise ValueError(f"{wanted}, {error}; use {remedy}") from error
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{wanted}, those of {type(layer).__name__} cannot be rotated outside its own code ({error!r}); use "
                f"{remedy}"
            ) from error
        tables[index] = by_type[kind]
    return tables
