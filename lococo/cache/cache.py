"""What a model remembers between calls: the memories of every layer, and how far each row has been read."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lococo.cache.decode import StepBuffers
from lococo.cache.memory import Memory, is_locked
from lococo.cache.plan import Plan, Row
from lococo.compat import Cache, CacheLayerMixin
from lococo.compression.base import Compressor
from lococo.config import LoCoCoConfig
from lococo.models.rotary import RotaryTable


class LayerCache(CacheLayerMixin):
    """What a layer remembers: one ``Memory`` for each group of KV heads that have the same number of slots.

    Parameters
    ----------
    config : LoCoCoConfig
    layer_idx : int
    window : int, optional
        Tokens a query of this layer sees, where the model limits them.

    Attributes
    ----------
    groups : list of (Memory, list of int)
        Every memory with the KV heads it holds.
    is_split : bool
        Whether heads have budgets of their own. If not, the one memory holds all heads, however many there are.
    steps : StepBuffers, optional
        The same buffers as a token that comes alone reads and writes them.
    """

    is_sliding = False

    def __init__(self, config: LoCoCoConfig, layer_idx: int, window: int | None = None) -> None:
        self.config = config
        by_config: dict[LoCoCoConfig, list[int]] = {}
        for head, head_config in enumerate(config.layer_configs(layer_idx)):
            by_config.setdefault(head_config, []).append(head)
        self.groups = [(Memory(head_config, window), heads) for head_config, heads in by_config.items()]
        self.is_split = config.slots_per_head is not None
        self.is_initialized = True  # for Transformers; buffers are made by the first write
        self.columns = 0
        self.window = window
        self.num_heads = 0  # query heads, once there are buffers
        self.steps: StepBuffers | None = None
        self._stepped: list[int] | None = None  # versions of the memories that the step buffers know of

    def __getstate__(self) -> dict[str, Any]:
        """Without the buffers of steps, which are views of what the memories hold: a copy makes its own."""
        return {**vars(self), "steps": None, "_stepped": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.renew_steps()

    def __copy__(self) -> LayerCache:
        return copy.deepcopy(self)  # a cache that shares buffers with another is none

    def look_back(self, window: int | None) -> LayerCache:
        """The same, after the layer has told how far its queries see."""
        self.window = window
        for memory, _ in self.groups:
            memory.window = window
        return self

    def buffers(self) -> list[torch.Tensor]:
        """Every buffer there is."""
        bias = [] if self.steps is None else [self.steps.bias]
        return [buffer for memory, _ in self.groups for buffer in memory.buffers()] + bias

    def make_buffers(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Make all buffers there will be, for tensors as those of ``read_step``."""
        for memory, heads in self.groups:
            held = slice(len(heads) if self.is_split else None)
            memory.make_buffers(key[:, held], value[:, held], query.shape[1] // key.shape[1] * query.shape[3])
        self.num_heads = query.shape[1]
        self.renew_steps()

    @torch.no_grad()
    def renew_steps(self) -> None:
        """Make the buffers of steps anew, if there are buffers, and no graph that reaches into them."""
        self.steps, self._stepped = None, None
        if self.num_heads and not any(memory.is_in_graph for memory, _ in self.groups):
            self.steps = StepBuffers(self.groups, self.num_heads)

    @property
    def held(self) -> torch.Tensor | None:
        """Values of the first group of heads, as an example of what is held; None before the first write."""
        memory = self.groups[0][0]
        return memory.values if memory.is_initialized else None

    def to(self, device: torch.device | str) -> None:
        """Move everything to a device."""
        self._map(lambda tensor: tensor.to(device))
        self.renew_steps()

    def read_step(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        plan_for: Callable[[LoCoCoConfig], Plan],
        head: Compressor | None,
        scale: float,
    ) -> torch.Tensor:
        """Attention of one token of every row, which the layer holds afterwards; without gradients.

        Parameters
        ----------
        query : torch.Tensor
            (batch, heads, 1, head_dim), rotated.
        key, value : torch.Tensor
            (batch, kv_heads, 1, head_dim), keys rotated.
        plan_for : callable
            Plan of the call, a step, for heads with a config.

        Returns
        -------
        torch.Tensor
            (batch, heads, 1, head_dim).
        """
        steps = self.open_steps(plan_for, head, query.shape[1])
        window = self.window
        if window is not None and max(row.seen for row in plan_for(self.config).rows) <= window:
            window = None
        return steps.read(query, key, value, scale, self.config.score_power == 2, window)

    def open_steps(
        self, plan_for: Callable[[LoCoCoConfig], Plan], head: Compressor | None, num_heads: int
    ) -> StepBuffers:
        """The buffers for steps, in line with all that was written. ``num_heads`` counts query heads."""
        if self.steps is None or self._stepped != self._versions() or is_locked(self.steps.bias):
            for memory, _ in self.groups:
                memory.begin_steps(plan_for(memory.config))
            self.num_heads = num_heads
            if self.steps is None or not self.steps.hold() or is_locked(self.steps.bias):
                self.steps = StepBuffers(self.groups, num_heads)
            self.steps.open(plan_for, head)
            self._stepped = self._versions()
        return self.steps

    @property
    def has_stepped(self) -> bool:
        """Whether a token has come as a step before."""
        return self._stepped is not None

    def close(
        self, plan_for: Callable[[LoCoCoConfig], Plan], head: Compressor | None, rotary: RotaryTable | None
    ) -> None:
        """Compress after a step that ends a block. Arguments as in ``read_step``."""
        for memory, _ in self.groups:
            memory.close(plan_for(memory.config).segments[0], head, rotary)

    def _versions(self) -> list[int]:
        return [memory.version for memory, _ in self.groups]

    def detach(self) -> None:
        """Cut the graph: back-propagation ends here."""
        for memory, _ in self.groups:
            memory.detach()

    # What Transformers asks of a cache layer.

    def lazy_initialization(self, *args, **kwargs) -> None:
        """Nothing: every memory makes its buffers at the first write."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand the new keys and values on: they are remembered by the attention, segment by segment."""
        return key_states, value_states

    def get_seq_length(self, *args) -> int:
        """Columns read, padding included: Transformers derives positions and mask offsets from it."""
        return self.columns

    def get_mask_sizes(self, query_length) -> tuple[int, int]:
        """Length and offset of the mask over everything read. None is ever built from them."""
        length = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.columns + length, 0

    def get_max_length(self) -> int:
        """-1: texts have no length limit."""
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget everything, keep the buffers."""
        for memory, _ in self.groups:
            memory.reset()
        self.columns = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes row ``beam_idx[i]``."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only the rows named."""
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Raise: see ``LoCoCoCache.crop``."""
        raise ValueError(CROP_ERROR)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for memory, _ in self.groups:
            memory.map(function)


CROP_ERROR = (
    "a LoCoCoCache cannot be cropped: tokens blended into slots cannot be taken out again. Assisted and prompt-lookup "
    "decoding need the full cache: use lococo.unpatch_model(model)"
)


class LoCoCoCache(Cache):
    """The cache of a patched model: M slots and an open block per layer, whatever the length read.

    Made by the model's forward and by ``generate``; pass one back in to go on reading. A copy, also by pickle or by
    ``save`` and ``load``, goes on as the original would.

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
        self.rows: tuple[Row, ...] = (Row(),)
        self.num_steps = 0
        self.ends_in_padding = False
        self.is_open = self.is_reading = False
        self.rotary_tables: dict = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the tables of the model, which may be another one by then."""
        return {**vars(self), "rotary_tables": {}, "is_open": False}

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
        if self.layers and self.layers[0].held is not None:
            held = [memory.values for memory, _ in self.layers[0].groups]
            mine |= {"num_kv_heads": sum(tensor.shape[1] for tensor in held), "head_dim": held[0].shape[-1]}
        wrong = [size for size in mine if mine[size] != shape[size]]
        if wrong:
            raise ValueError(
                f"{name} is of another model: it has {_fields(mine, wrong)}, this model {_fields(shape, wrong)}"
            )

    def to(self, device: torch.device | str) -> LoCoCoCache:
        """Move everything to a device, in place. A layer fetches what is elsewhere when it reads."""
        for layer in self.layers:
            layer.to(device)
        self.rotary_tables = {}
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
        """Bytes of all buffers. They are made at the first forward and do not grow."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.buffers())

    def advance(self, plan: Plan, columns: int) -> None:
        """Note that a planned call has been read."""
        self.rows = plan.rows
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
        self.rows, self.ends_in_padding, self.is_open, self.is_reading = (Row(),), False, False, False

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
        """Only the rows named."""
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
