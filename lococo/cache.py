"""What a layer remembers between calls: slots, the open block, and how far each row has been read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

import torch

from lococo.compat import Cache, CacheLayerMixin
from lococo.config import LoCoCoConfig
from lococo.fusion import FusionHead
from lococo.positions import RotaryTable
from lococo.segments import AlignedSegment, Compression, Plan, Row, Segment, Step
from lococo.slots import Budget, Entries, compress
from lococo.steps import StepBuffers


class Memory:
    """Entries of KV heads with the same budget, in buffers of ``num_slots + block_size`` made at the first write.

    Without gradients everything is written in place; with gradients every write makes a new tensor, so that
    back-propagation reaches the tokens of earlier segments.

    Parameters
    ----------
    config : LoCoCoConfig
    window : int, optional
        Tokens a query of this layer sees, where the model limits them.

    Attributes
    ----------
    entries : Entries
        ``num_slots + block_size`` of them, used from the first on.
    keys, values : torch.Tensor
        (batch, kv_heads, capacity, head_dim), what attention reads.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, config: LoCoCoConfig, window: int | None = None) -> None:
        self.config = config
        self.window = window
        self.is_initialized = False
        self.is_in_graph = False
        self.version = 0  # counts changes by anything but steps
        self._rotated_from: int | None = None  # entries of which only the rotated keys have been written

    def hold(self, entries: Entries) -> None:
        """Take these entries for its own."""
        self.version += 1
        self.entries = entries
        self.keys = entries.keys if entries.rotated is None else entries.rotated
        self.values = entries.values

    def make_buffers(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Make the buffers for keys and values of (batch, kv_heads, tokens, head_dim)."""
        config, budget = self.config, Budget.of(self.config, self.window)
        shape = (*key.shape[:2], config.capacity)
        wide = torch.promote_types(key.dtype, torch.float32)

        def numbers(wanted: bool) -> torch.Tensor | None:
            return torch.zeros(shape, dtype=wide, device=key.device) if wanted else None

        ranked = budget.heavy > 0 or (budget.fused > 0 and config.residual != "none")
        keys = key.new_zeros(*shape, key.shape[-1])
        entries = Entries(
            keys=keys,
            values=value.new_zeros(*shape, value.shape[-1]),
            scores=numbers(ranked),
            born=numbers(self.window is not None or (ranked and config.score in ("mean", "distant"))),
            log_mass=numbers(config.has_mass and budget.fused > 0),
            rotated=torch.zeros_like(keys) if config.positions == "slot" else None,
        )
        self.hold(entries)
        self.is_initialized = True

    def tokens(self, key: torch.Tensor, value: torch.Tensor, plan: Plan, rotary: RotaryTable | None) -> Entries:
        """The tokens of a call as entries.

        Parameters
        ----------
        key, value : torch.Tensor
            (batch, kv_heads, tokens, head_dim), keys rotated.
        rotary : RotaryTable, optional
            None where keys are not rotated, or stay as they came (``positions="absolute"``).
        """
        if not self.is_initialized:
            self.make_buffers(key, value)
        self._settle(rotary)
        shape = (*key.shape[:2], plan.places.shape[1])
        return Entries(
            keys=key if rotary is None else rotary.rotate(key, plan.entries, inverse=True),
            values=value,
            scores=key.new_zeros(()).expand(shape),
            born=plan.places[:, None].expand(shape),
            log_mass=key.new_zeros(()).expand(shape),
            rotated=key,
        )

    def append(self, segment: Segment, tokens: Entries) -> None:
        """Write a segment of the call's tokens into its entries."""
        in_place = not torch.is_grad_enabled()
        self.make_writable(in_place)
        self.is_in_graph = not in_place
        self.hold(self.entries.combine(tokens, lambda memory, new: segment.write(memory, new, in_place)))

    def begin_steps(self, plan: Plan) -> None:
        """Make ready for tokens that come one by one and are written by ``StepBuffers``; without gradients."""
        self.make_writable()
        self.is_in_graph = False
        if self.entries.rotated is not None and self._rotated_from is None:
            self._rotated_from = cast(AlignedSegment, plan.segments[0]).start

    def _settle(self, rotary: RotaryTable | None) -> None:
        """Write the un-rotated keys that steps leave to the end of their block."""
        if self._rotated_from is None:
            return
        self.make_writable()
        late = slice(self._rotated_from, None)
        keys, self._rotated_from = self.keys[:, :, late], None
        if rotary is not None:
            places = torch.arange(self.config.capacity, device=keys.device)[None, late]
            keys = rotary.rotate(keys, places, inverse=True)
        self.entries.keys[:, :, late] = keys

    def mass_bias(self, head: FusionHead | None, stop: int | None = None) -> torch.Tensor | None:
        """(batch, kv_heads, entries up to ``stop``) bias on the logits by what entries stand for; None: no bias."""
        log_mass = self.entries.log_mass
        if log_mass is None or head is None or head.is_closed:
            return None
        return head.mass_bias(log_mass[:, :, :stop])

    def make_writable(self, in_place: bool = True) -> None:
        """Copy the buffers where a graph, or inference mode, forbids to write to them."""
        # A graph may hold buffers that need no gradient themselves: the query's gradient needs keys and values.
        is_needed_by_graph = in_place and self.is_in_graph
        if is_needed_by_graph or (not torch.compiler.is_compiling() and _is_locked(self.values)):
            self.map(lambda tensor: tensor.detach().clone())

    def compress(self, compression: Compression, head: FusionHead | None, rotary: RotaryTable | None) -> None:
        """Replace the first entries of some rows by their M slots."""
        self._settle(rotary)
        rows, num_slots = compression.rows, self.config.num_slots
        in_place = not torch.is_grad_enabled()

        def entries_of(tensor: torch.Tensor) -> torch.Tensor:
            return (tensor if rows is None else tensor[rows])[:, :, : compression.entries]

        def replace(memory: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
            if not in_place:
                whole = torch.slice_scatter(memory if rows is None else memory[rows], slots, dim=2, end=num_slots)
                return whole if rows is None else memory.index_copy(0, rows, whole)
            if rows is None:
                memory[:, :, :num_slots] = slots
            else:
                memory[rows, :, :num_slots] = slots
            return memory

        before = dataclasses.replace(self.entries, rotated=None).map(entries_of)
        slots = compress(before, compression.now, self.config, head, self.window)
        if self.entries.rotated is not None:
            places = torch.arange(num_slots, device=slots.keys.device)[None]
            slots.rotated = slots.keys if rotary is None else rotary.rotate(slots.keys, places)
        self.hold(self.entries.combine(slots, replace))

    def fade_scores(self, segment: Segment) -> None:
        """Let attention of the past count less after a block is complete."""
        scores, per_token = self.entries.scores, self.config.score_fade
        if scores is not None and per_token < 1 and segment.ends_block:
            scores.mul_(segment.fading(per_token))

    def buffers(self) -> list[torch.Tensor]:
        """Every buffer there is."""
        if not self.is_initialized:
            return []
        return [tensor for tensor in self.entries.tensors() if tensor is not None]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put a function of every buffer in its place."""
        if self.is_initialized:
            self.hold(self.entries.map(function))

    def reset(self) -> None:
        """Forget everything, keep the buffers."""
        if self.is_initialized:
            self.make_writable()
            self.map(torch.Tensor.zero_)
        self.is_in_graph, self._rotated_from = False, None

    def detach(self) -> None:
        """Cut the graph: back-propagation ends here."""
        self.map(torch.Tensor.detach)
        self.is_in_graph = False


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
        self._steps: StepBuffers | None = None
        self._stepped: list[int] | None = None  # versions of the memories that the step buffers know of

    def look_back(self, window: int | None) -> LayerCache:
        """The same, after the layer has told how far its queries see."""
        for memory, _ in self.groups:
            memory.window = window
        return self

    def buffers(self) -> list[torch.Tensor]:
        """Every buffer there is."""
        bias = [] if self._steps is None else [self._steps.bias]
        return [buffer for memory, _ in self.groups for buffer in memory.buffers()] + bias

    def make_buffers(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Make all buffers there will be, for tensors as those of ``read_step``."""
        for memory, heads in self.groups:
            held = slice(len(heads) if self.is_split else None)
            memory.make_buffers(key[:, held], value[:, held])
        self._steps = StepBuffers(self.groups, query.shape[1])

    def read_step(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        plan_for: Callable[[LoCoCoConfig], Plan],
        head: FusionHead | None,
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
            Plan of the call for heads with a config, with a ``step``; in an ``AlignedSegment`` where positions are
            places in the cache.

        Returns
        -------
        torch.Tensor
            (batch, heads, 1, head_dim).
        """
        first = self.groups[0][0]
        if self._stepped != self._versions():
            self._open_steps(query, plan_for, head)
        is_limited = first.window is not None and max(row.seen for row in plan_for(first.config).rows) > first.window
        window = first.window if is_limited else None
        return cast(StepBuffers, self._steps).read(query, key, value, scale, first.config.score == "distant", window)

    def _open_steps(
        self, query: torch.Tensor, plan_for: Callable[[LoCoCoConfig], Plan], head: FusionHead | None
    ) -> None:
        for memory, _ in self.groups:
            memory.begin_steps(plan_for(memory.config))
        if self._steps is None or not self._steps.hold():
            self._steps = StepBuffers(self.groups, query.shape[1])
        self._steps.open(lambda memory: cast(Step, plan_for(memory.config).step), head)
        self._stepped = self._versions()

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


def _is_locked(tensor: torch.Tensor) -> bool:
    """Whether it was made in inference mode and may not be written to any more."""
    return tensor.is_inference() and not torch.is_inference_mode_enabled()


class LoCoCoCache(Cache):
    """The ``past_key_values`` of a patched model: M slots and an open block per layer, whatever the length read.

    Made by the model's forward and by ``generate``; pass one back in to go on reading.

    Parameters
    ----------
    config : LoCoCoConfig
    num_layers : int
    """

    layers: list[LayerCache]  # type: ignore[assignment]

    def __init__(self, config: LoCoCoConfig, num_layers: int) -> None:
        super().__init__(layers=[LayerCache(config, layer_idx) for layer_idx in range(num_layers)])
        self.config = config
        self.rows: tuple[Row, ...] = (Row(),)
        self.ends_in_padding = False
        self.is_reading = False
        self.rotary_tables: dict = {}

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
        for layer in self.layers:
            layer.columns += columns

    def detach(self) -> None:
        """Cut the graph, so that back-propagation through what is read next ends here."""
        for layer in self.layers:
            layer.detach()

    def reset(self) -> None:
        """Forget everything, keep the buffers."""
        super().reset()
        self.rows, self.ends_in_padding, self.is_reading = (Row(),), False, False

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
