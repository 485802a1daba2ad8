"""What one layer remembers: slots and an open block for every KV head, in buffers that the layer owns."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lococo.cache.buffers import (
    HeadGroup,
    KVBuffer,
    LayerModules,
    Observer,
    TokenStates,
    group_heads,
    is_locked,
    make_entries,
)
from lococo.cache.decode import DecodeBuffers
from lococo.cache.plan import Plan, RowState, upload
from lococo.compat import CacheLayerMixin
from lococo.compression.codes import Codec
from lococo.compression.entries import Entries
from lococo.config import LoCoCoConfig

CROP_ERROR = (
    "a LoCoCoCache cannot be cropped: tokens blended into slots cannot be taken out again. Assisted and prompt-lookup "
    "decoding need the full cache: use lococo.unpatch_model(model)"
)


class LayerCache(CacheLayerMixin):
    """What a layer remembers, in buffers of ``num_slots + block_size`` entries per KV head made at the first write.

    It owns them; ``KVBuffer`` and ``DecodeBuffers`` are views made from it. Without gradients they stay where they
    are for good, so that a recorded step finds them.

    Parameters
    ----------
    config : LoCoCoConfig
    layer_idx : int

    Attributes
    ----------
    config : LoCoCoConfig
        What is in force in this layer.
    window : int, optional
        Tokens a query of this layer sees, where the model limits them; see ``set_window``.
    entries : Entries, optional
        (batch, entries of all KV heads, ...); None before the first write.
    groups : tuple of HeadGroup
        Empty before the first write.
    observer : callable, optional
        Called with a ``KVBuffer``, the entries, tokens read and head of every compression, before it is done.
    decode : DecodeBuffers, optional
        The same buffers as a token that comes alone reads and writes them; None while a graph reaches into them.
    finished_columns : int, optional
        Columns read before the first step of which something is left to write: see ``_finish_steps``.
    """

    is_sliding = False

    def __init__(self, config: LoCoCoConfig, layer_idx: int) -> None:
        self.config = config
        self.layer_idx = layer_idx
        self.is_initialized = True  # for Transformers; buffers are made by the first write
        self.columns = 0
        self.window: int | None = None
        self.entries: Entries | None = None
        self.groups: tuple[HeadGroup, ...] = ()
        self.num_heads = 0  # query heads
        self.codec: Codec | None = None  # where entries are held as codes
        self.decode: DecodeBuffers | None = None
        self.observer: Observer | None = None
        self.has_stepped = False  # since the buffers were made
        self.finished_columns: int | None = None
        self._views: list[KVBuffer] = []
        self._is_shared = False  # a graph may have saved these entries, or memory of theirs

    @classmethod
    def over(
        cls,
        entries: Entries,
        config: LoCoCoConfig,
        layer_idx: int,
        groups: tuple[HeadGroup, ...],
        num_heads: int,
        codec: Codec | None = None,
    ) -> LayerCache:
        """A layer over entries that somebody else owns, to read into them, not token by token.

        Parameters
        ----------
        entries : Entries
            (batch, entries of all KV heads, ...), as ``make_entries`` makes them, coded if there is a codec.
        groups : tuple of HeadGroup
            Of the KV heads that are here, which may be some of the layer's.
        num_heads : int
            Query heads.
        """
        layer = cls(config, layer_idx)
        layer.groups, layer.num_heads, layer.codec = groups, num_heads, codec
        layer._hold(entries, is_shared=False)
        return layer

    def __getstate__(self) -> dict[str, Any]:
        """What a copy goes on from: buffers of its own, which some pickles would share, outside of any graph."""
        entries = None if self.entries is None else self.entries.map(lambda tensor: tensor.detach().clone())
        return {**vars(self), "entries": entries, "decode": None, "_decoded": None, "_views": [], "_is_shared": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.entries is not None:
            self._own(self.entries)

    def __copy__(self) -> LayerCache:
        return copy.deepcopy(self)  # a cache that shares buffers with another is none

    def set_window(self, window: int | None) -> None:
        """Learn how many tokens a query sees, from the layer that is about to read.

        Raises
        ------
        ValueError
            If what is held was read with another window.
        """
        if window == self.window:
            return
        if self.window is not None or self.entries is not None:
            raise ValueError(
                f"layer {self.layer_idx} of this LoCoCoCache was read with a sliding window of {self.window} tokens, "
                f"this model's has {window}: start without it"
            )
        self.window, self.config = window, self.config.for_window(window)

    @property
    def is_split(self) -> bool:
        """Whether heads have budgets of their own. If not, there is one group, of all heads."""
        return self.config.slots_per_head is not None

    @property
    def num_kv_heads(self) -> int:
        """Heads held; 0 before the first write."""
        return sum(len(group.heads) for group in self.groups)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token in one row; 0 before the first write."""
        if self.entries is None:
            return 0
        if self.codec is not None:
            return sum(
                self.num_kv_heads * size * dtype.itemsize
                for size, dtype in zip(self.codec.sizes, self.codec.dtypes, strict=True)
            )
        held = (self.entries.keys, self.entries.values)
        return sum(self.num_kv_heads * tensor.shape[-1] * tensor.element_size() for tensor in held)

    @property
    def is_coded(self) -> bool:
        """Whether keys or values are held as codes: not while a graph needs them."""
        return torch.uint8 in (self._held.keys.dtype, self._held.values.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of values that are no codes."""
        return self.codec.dtypes[1] if self.codec is not None else self._held.values.dtype

    @property
    def head_dim(self) -> int:
        """Numbers of a value."""
        return self.codec.sizes[1] if self.codec is not None else self._held.values.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        if self.entries is None:
            return 0
        steps = [] if self.decode is None else self.decode.tensors()
        return sum(tensor.nbytes for tensor in (*self.entries.tensors(), *steps) if tensor is not None)

    def buffers(self) -> list[torch.Tensor]:
        """Every buffer that is written to."""
        if self.entries is None:
            return []
        bias = [] if self.decode is None else [self.decode.bias]
        return [tensor for tensor in self.entries.tensors() if tensor is not None] + bias

    def make_buffers(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, network: Any | None = None
    ) -> None:
        """Make all buffers there will be, for tensors as those of ``step`` and a learned score's network."""
        self.num_heads, self.groups = query.shape[1], self.group_heads(key.shape[1])
        entries, self.codec = make_entries(self.groups, self.window, query, key, value, network)
        self._own(entries)

    def group_heads(self, num_kv_heads: int) -> tuple[HeadGroup, ...]:
        """Heads with the same budget together, in the order in which they lie in the buffers."""
        configs = self.config.layer_configs(self.layer_idx)
        return group_heads(configs if self.is_split else configs * num_kv_heads)

    @torch.no_grad()
    def _own(self, entries: Entries) -> None:
        """Take these entries for the layer's own, outside of any graph."""
        self._hold(entries, is_shared=False)
        if self.codec is not None and not self.is_coded:
            self._hold(self.codec.encoded(entries), is_shared=False)
        self.decode, self.has_stepped = self._decode_buffers(), False

    def _decode_buffers(self) -> DecodeBuffers:
        return DecodeBuffers(self._held, self.groups, self.num_heads, self.codec)

    def _hold(self, entries: Entries, is_shared: bool) -> None:
        self.entries, self._views, self.decode, self._is_shared = entries, [], None, is_shared
        self._decoded: Entries | None = None

    def to(self, device: torch.device | str | None) -> None:
        """Move everything to a device; None: it stays where it is, as a tensor would."""
        if self.entries is not None and device is not None and self.entries.values.device != torch.device(device):
            self._replace(lambda tensor: tensor.to(device))

    # Reading: every group of heads over a view of its entries.

    def views(self) -> list[KVBuffer]:
        """A view of every group's entries, written in place; none before the first write."""
        if not self._views:
            self._views = [self._view(group, in_place=True) for group in self.groups]
        for view in self._views:
            view.window, view.observer = self.window, self.observer
        return self._views

    def begin_call(self, plan: Plan, modules: LayerModules) -> list[KVBuffer]:
        """Views to be read and written in a call, with gradients or in place; ``end_call`` takes them back."""
        in_place = not torch.is_grad_enabled()
        self._make_writable(in_place)
        self._decoded = self.codec.decoded(self._held) if self.codec is not None and self.is_coded else None
        self._finish_steps(plan.before, modules)
        self._forget_decode()
        if in_place and self._decoded is None:
            return self.views()
        return [self._view(group, in_place) for group in self.groups]

    def end_call(self, views: Sequence[KVBuffer]) -> None:
        """Take over what a call has made of the views: all of it with gradients, else what codes have to stand for."""
        if all(view.in_place for view in views):
            if self._decoded is not None and self.codec is not None:
                self._held.combine(self.codec.encoded(self._decoded), _copy_codes)
                self._decoded = None
            return
        parts = [view.entries.map(lambda tensor: tensor.flatten(1, 2)) for view in views]
        if len(parts) > 1:
            fields = zip(*(part.tensors() for part in parts), strict=True)
            parts = [Entries(*(None if each[0] is None else torch.cat(each, dim=1) for each in fields))]  # type: ignore
        self._hold(parts[0], is_shared=True)

    def _view(self, group: HeadGroup, in_place: bool) -> KVBuffer:
        """With entries of (batch, kv_heads of the group, capacity, ...)."""
        shape, held = (len(group.heads), group.config.capacity), self._decoded
        held = self._held if held is None else held
        entries = held.map(lambda tensor: tensor[:, group.start : group.stop].unflatten(1, shape))
        return KVBuffer(group, self.window, entries, in_place, self.observer, self.codec)

    def _forget_decode(self) -> None:
        if self.decode is not None:
            self.decode.is_current = False

    @property
    def _held(self) -> Entries:
        assert self.entries is not None  # made by the first write
        return self.entries

    def _make_writable(self, in_place: bool = True) -> None:
        """Copy the entries where a graph, or inference mode, forbids to write to them."""
        # A graph may hold buffers that need no gradient themselves: the query's gradient needs keys and values.
        is_needed = in_place and self._is_shared
        buffers = [self._held.values, *([] if self.decode is None else [self.decode.bias])]
        if is_needed or any(map(is_locked, buffers)):
            self._own(self._held.map(lambda each: each.detach().clone(memory_format=torch.contiguous_format)))

    def states(self, key: torch.Tensor, value: torch.Tensor, plan: Plan, modules: LayerModules) -> TokenStates:
        """What the layer makes of a call's tokens, for keys (rotated) and values of all KV heads."""
        return self._states(
            key, value, plan.positions if self._held.rotated is None else plan.cache_positions, modules
        )

    def _states(
        self, key: torch.Tensor, value: torch.Tensor, rotated_at: torch.Tensor, modules: LayerModules
    ) -> TokenStates:
        entries, features = self._held, None
        key_range, value_range, unrotated_range = None, None, None
        if self.codec is not None:
            (key, key_range), (value, value_range) = self.codec.rounded(key, value)
        unrotated, moves_keys = key, entries.rotated is not None
        if modules.rotary is not None and (moves_keys or entries.features is not None):
            # Which entries are kept has no gradient, so keys that the network alone sees have none.
            unrotated = modules.rotary.rotate(key if moves_keys else key.detach(), rotated_at, inverse=True)
        if moves_keys and self.codec is not None:
            unrotated, unrotated_range = self.codec.rounded_keys(unrotated)
        if entries.features is not None and modules.network is not None:
            with torch.no_grad():
                features = modules.network(unrotated, value)
        unrotated = unrotated if moves_keys else key
        return TokenStates(key, value, unrotated, features, key_range, value_range, unrotated_range)

    @torch.no_grad()
    def _finish_steps(self, rows: Sequence[RowState], modules: LayerModules) -> None:
        """Write what steps leave to the end of their block: keys that are not rotated, and features of tokens."""
        if self.finished_columns is None:
            return
        count, self.finished_columns = self.columns - self.finished_columns, None
        late = torch.arange(-count, 0)
        views = self.views() if self._decoded is None else [self._view(group, in_place=True) for group in self.groups]
        places = [late + torch.tensor([[row.num_entries(view.config.num_slots)] for row in rows]) for view in views]
        device = self._held.keys.device
        index = [upload(place, device)[:, None] for place in places]  # (1 or batch, 1, count)
        read = [_take(view.keys, at) for view, at in zip(views, index, strict=True)]
        values = [_take(view.values, at) for view, at in zip(views, index, strict=True)]
        seen = late + torch.tensor([[row.seen] for row in rows])
        rotated_at = upload(seen, device) if self._held.rotated is None else index[0][:, 0]
        states = self._states(self._by_head(read), self._by_head(values), rotated_at, modules)
        for view, at in zip(views, index, strict=True):
            mine = states.map(functools.partial(heads_of, heads=view.group.heads))
            if view.entries.rotated is not None:
                _put(view.entries.keys, at, mine.unrotated)
                if view.entries.keys_range is not None and mine.unrotated_range is not None:
                    _put(view.entries.keys_range, at, mine.unrotated_range)
            if view.entries.features is not None and mine.features is not None:
                _put(view.entries.features, at, mine.features)

    def _by_head(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Tensors of the groups as one of all KV heads, in the model's order."""
        if len(parts) == 1:
            return parts[0]
        by_head: dict[int, torch.Tensor] = {}
        for group, part in zip(self.groups, parts, strict=True):
            by_head.update(zip(group.heads, part.split(1, dim=1), strict=True))
        return torch.cat([by_head[head] for head in sorted(by_head)], dim=1)

    # Decoding: one token of every row, over all entries at once.

    def prepare_step(self, plan_for: Callable[[LoCoCoConfig], Plan], modules: LayerModules) -> DecodeBuffers:
        """Close the block if it is complete; the buffers for the step of a plan, in line with all that was written."""
        if plan_for(self.config).closes_block:
            views = self.begin_call(plan_for(self.config), modules)
            for view in views:
                view.close_block(plan_for(view.config).segments[0], modules)
            self.end_call(views)
        self._make_writable()
        if self.decode is None:
            self.decode = self._decode_buffers()
        if not self.decode.is_current:
            plans = [plan_for(group.config) for group in self.groups]
            self.decode.sync(plans, [view.mass_bias(modules.head) for view in self.views()])
            leaves = self._held.rotated is not None or self._held.features is not None
            if leaves and self.finished_columns is None:
                self.finished_columns = self.columns
        return self.decode

    def step(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        plan_for: Callable[[LoCoCoConfig], Plan],
        modules: LayerModules,
        scale: float,
        attend: Callable | None = None,
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
        attend : callable, optional
            As in ``DecodeBuffers.read``.

        Returns
        -------
        torch.Tensor
            (batch, heads, 1, head_dim).
        """
        decode = self.prepare_step(plan_for, modules)
        window = self.window
        if window is not None and max(row.seen for row in plan_for(self.config).rows) <= window:
            window = None
        self.has_stepped = True
        return decode.read(query, key, value, scale, self.config.score_power == 2, window, attend)

    # What Transformers asks of a cache layer.

    def lazy_initialization(self, *args, **kwargs) -> None:
        """Nothing: the first write makes the buffers."""

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
        self.columns, self.finished_columns = 0, None
        if self.entries is not None:
            self._make_writable()
            self._held.map(torch.Tensor.zero_)
            self._forget_decode()

    def detach(self) -> None:
        """Cut the graph: back-propagation ends here, before the compression of a block that is complete."""
        if self.entries is not None:
            self._hold(self.entries.map(torch.Tensor.detach), self._is_shared)  # a graph still shares the memory

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes row ``beam_idx[i]``."""
        self._replace(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        self._replace(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only the rows named."""
        self._replace(lambda tensor: tensor[indices.to(tensor.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Raise ``ValueError``: fusing cannot be undone."""
        raise ValueError(CROP_ERROR)

    def _replace(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put a function of every buffer in its place: into the same memory, where it fits and no graph needs it."""
        if self.entries is None:
            return
        changed = self.entries.map(function)
        if self._is_shared:
            self._hold(changed, is_shared=True)
            return
        old, new = self.entries.values, changed.values
        if old.shape != new.shape or old.device != new.device or is_locked(old):
            self._own(changed)
            return
        self.entries.combine(changed, torch.Tensor.copy_)
        self._forget_decode()


def _copy_codes(held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Into the same memory; what is no code was written there already."""
    return held if new is held else held.copy_(new)


def heads_of(tensor: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
    """The part of (batch, kv_heads, ...) that is of some heads, in their order."""
    if len(heads) == tensor.shape[1]:
        return tensor
    parts = [tensor[:, head : head + 1] for head in heads]  # slices, so that no index is uploaded
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _take(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Entries of (batch, heads, entries, d) at (1 or batch, 1, count) places."""
    return tensor.gather(2, _expanded(index, tensor))


def _put(tensor: torch.Tensor, index: torch.Tensor, part: torch.Tensor) -> None:
    """Write (batch, heads, count, d) to (1 or batch, 1, count) places, with the same for every head."""
    tensor.scatter_(2, _expanded(index, tensor), part.to(tensor.dtype))


def _expanded(index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return index[..., None].expand(*like.shape[:2], index.shape[-1], like.shape[-1])
