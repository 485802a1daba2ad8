"""What a model remembers between calls: the slots of every layer, and how far each row has been read."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lococo.cache.buffers import LayerModules
from lococo.cache.layer import CROP_ERROR, LayerCache
from lococo.cache.plan import Plan, RowState
from lococo.compat import Cache
from lococo.config import LoCoCoConfig


class LoCoCoCache(Cache):
    """The cache of a patched model: M slots and an open block per layer and KV head, however long the text.

    Made by the model's forward and by ``generate``; pass it back in to continue the text. A copy, also one made by
    pickle or by ``save`` and ``load``, continues as the original would.

    Parameters
    ----------
    config : LoCoCoConfig
    num_layers : int

    Attributes
    ----------
    is_open : bool
        A patched model's forward is under way with it.
    is_reading : bool
        Layers have been written to in a forward that has not ended.
    """

    layers: list[LayerCache]  # type: ignore[assignment]

    def __init__(self, config: LoCoCoConfig, num_layers: int) -> None:
        super().__init__(layers=[LayerCache(config, layer_idx) for layer_idx in range(num_layers)])
        self.config = config
        self.rows: tuple[RowState, ...] = (RowState(),)
        self.num_steps = 0
        self.ends_in_padding = False
        self.is_open = self.is_reading = False

    def __getstate__(self) -> dict[str, Any]:
        """What a copy goes on from: no forward is under way with it."""
        return {**vars(self), "is_open": False}

    def __copy__(self) -> LoCoCoCache:
        return copy.deepcopy(self)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand a layer's new keys and values on, in the forward of a patched model.

        Raises
        ------
        ValueError
            In the forward of any other model, which would find nothing in it of what was read before.
        """
        if not self.is_open:
            raise ValueError(
                "a LoCoCoCache was given to a model that is not patched (or no more, or was patched inside another "
                "model): call lococo.patch_model on it first, or start without this cache"
            )
        return super().update(key_states, value_states, *args, **kwargs)

    def check_fits(self, config: LoCoCoConfig, shape: dict[str, int], name: str) -> None:
        """Refuse to be read on by a model whose method or shape is another.

        Parameters
        ----------
        config : LoCoCoConfig
            What the model is patched with.
        shape : dict
            Of the model, as ``lococo.models.base_shape`` gives it.
        name : str
            What the model calls its cache.

        Raises
        ------
        ValueError
            Names the fields that differ.
        """
        if self.config != config:
            theirs, ours = config.to_dict(), self.config.to_dict()
            changed = [field for field in theirs if theirs[field] != ours[field]]
            raise ValueError(
                f"{name} was filled with {_fields(ours, changed)}, the model is patched with "
                f"{_fields(theirs, changed)}: start without it, or patch the model as it was"
            )
        mine = {"num_layers": len(self.layers)}
        held = self.layers[0].entries if self.layers else None
        if held is not None:
            mine |= {"num_kv_heads": self.layers[0].num_kv_heads, "head_dim": self.layers[0].head_dim}
        wrong = [size for size in mine if mine[size] != shape[size]]
        if wrong:
            raise ValueError(
                f"{name} is of another model: it has {_fields(mine, wrong)}, this model {_fields(shape, wrong)}"
            )

    def to(self, device: torch.device | str | None) -> LoCoCoCache:
        """Move everything to a device, in place. A layer fetches what is elsewhere when it reads."""
        for layer in self.layers:
            layer.to(device)
        return self

    def save(self, path: str | os.PathLike) -> Path:
        """Write everything into one safetensors file, whole or not at all; see ``lococo.cache.file``.

        Raises
        ------
        ValueError
            If nothing has been read yet, or the last forward did not finish.
        """
        from lococo.cache.file import save_cache

        return save_cache(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str = "cpu") -> LoCoCoCache:
        """A cache from a file written by ``save``.

        Parameters
        ----------
        device : torch.device or str
            Where to put it.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is no whole file of a cache.
        """
        from lococo.cache.file import load_cache

        return load_cache(path, device)

    @property
    def seen_tokens(self) -> int:
        """Columns read so far, padding included."""
        return self.layers[0].columns

    @property
    def batch_size(self) -> int:
        """Rows held, -1 before the first forward."""
        buffers = self.layers[0].buffers()
        return buffers[0].shape[0] if buffers else -1

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held. It is made at the first forward and does not grow.

        While a graph holds the entries, what steps need besides them is not there.
        """
        return sum(layer.nbytes for layer in self.layers)

    def make_ready(
        self,
        plan_for: Callable[[LoCoCoConfig], Plan],
        modules: Sequence[LayerModules],
    ) -> None:
        """Prepare every layer for a step that is replayed; if it is launched after all, they are ready for it, too.

        Parameters
        ----------
        plan_for : callable
            Plan of the step for heads with a config.
        modules : sequence of LayerModules
            Of the layers.
        """
        self.is_reading = True
        for layer, of_layer in zip(self.layers, modules, strict=True):
            layer.prepare_step(plan_for, of_layer)
        self.rows, self.is_reading = tuple(row.with_block_closed() for row in self.rows), False

    def advance(self, plan: Plan, columns: int, ends_in_padding: bool = False) -> None:
        """Note that a planned call has been read, and whether the last column of a row was padding."""
        self.rows, self.ends_in_padding = plan.rows, ends_in_padding
        self.num_steps += plan.is_step
        for layer in self.layers:
            layer.columns += columns

    def detach(self) -> None:
        """Cut the graph, so that back-propagation through what is read next ends here."""
        for layer in self.layers:
            layer.detach()

    def reset(self) -> None:
        """Forget everything, keep the buffers."""
        super().reset()
        self.rows, self.ends_in_padding, self.is_open, self.is_reading = (RowState(),), False, False, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes row ``beam_idx[i]`` (beam search)."""
        super().reorder_cache(beam_idx)
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        super().batch_repeat_interleave(repeats)
        if len(self.rows) > 1:
            self.rows = tuple(row for row in self.rows for _ in range(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only the rows named, by their numbers or by a mask of all rows."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        super().batch_select_indices(indices)
        self._select_rows(indices)

    def crop(self, *args, **kwargs) -> None:
        """Raise ``ValueError``: fusing cannot be undone."""
        raise ValueError(CROP_ERROR)

    def _select_rows(self, indices: torch.Tensor) -> None:
        # Rows that are all alike need no look at the indices, which may be on a GPU.
        if len(set(self.rows)) > 1:
            self.rows = tuple(self.rows[index] for index in indices.tolist())
        else:
            self.rows = self.rows[:1]


def _fields(values: dict[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name}={values[name]}" for name in names)
