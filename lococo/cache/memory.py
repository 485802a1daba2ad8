"""What KV heads with the same budget remember: slots and the open block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch

from lococo.cache.plan import AlignedSegment, Compression, Plan, Segment
from lococo.compression.base import Compressor, get_compressor
from lococo.compression.entries import Entries, by_group
from lococo.compression.scores import get_score
from lococo.compression.select import Budget, compress
from lococo.config import LoCoCoConfig
from lococo.models.rotary import RotaryTable


class Memory:
    """Entries of KV heads with the same budget, in buffers of ``num_slots + block_size`` made at the first write.

    Without gradients everything is written in place; with gradients every write makes a new tensor, so that
    back-propagation reaches the tokens of earlier segments. A complete block is then compressed when the next token
    comes, not before: cut in between, the graph of what comes next holds the compression, and its head learns from it.

    Parameters
    ----------
    config : LoCoCoConfig
    window : int, optional
        Tokens a query of this layer sees, where the model limits them.

    Attributes
    ----------
    entries : Entries
        ``num_slots + block_size`` of them, used from the first on.
    """

    entries: Entries

    def __init__(self, config: LoCoCoConfig, window: int | None = None) -> None:
        self.config = config
        self.window = window
        self.is_initialized = False
        self.is_in_graph = False
        self.version = 0  # counts changes by anything but steps
        self._rotated_from: int | None = None  # entries of which only the rotated keys have been written
        # What will compress a complete block, with gradients: a segment, the layer's head and its rotary table.
        self._due: tuple[Segment, Compressor | None, RotaryTable | None] | None = None

    def hold(self, entries: Entries) -> None:
        """Take these entries for its own."""
        self.version += 1
        self.entries = entries

    @property
    def keys(self) -> torch.Tensor:
        """(batch, kv_heads, capacity, head_dim), the keys that attention reads."""
        return self.entries.keys if self.entries.rotated is None else self.entries.rotated

    @property
    def values(self) -> torch.Tensor:
        """(batch, kv_heads, capacity, head_dim)."""
        return self.entries.values

    def __getstate__(self) -> dict[str, Any]:
        """What a copy, or a pickle, goes on from: buffers of its own, outside of any graph, with nothing put off."""
        state = {**vars(self), "_due": None, "is_in_graph": False}
        if not self.is_initialized:
            return state
        twin = object.__new__(type(self))
        vars(twin).update(state)
        with torch.no_grad():
            twin.hold(self.entries.map(lambda tensor: tensor.detach().clone()))
            if self._due is not None:
                twin._close(*self._due)
        return vars(twin)

    def make_buffers(self, key: torch.Tensor, value: torch.Tensor, query_size: int = 0) -> None:
        """Make the buffers for keys and values of (batch, kv_heads, tokens, head_dim).

        Parameters
        ----------
        query_size : int
            Numbers in the queries of a KV head's group.
        """
        config, budget = self.config, Budget.of(self.config, self.window)
        shape = (*key.shape[:2], config.capacity)
        wide = torch.promote_types(key.dtype, torch.float32)

        def numbers(wanted: bool) -> torch.Tensor | None:
            return torch.zeros(shape, dtype=wide, device=key.device) if wanted else None

        needs = get_score(config.score).needs if budget.is_ranked(config) else frozenset()
        keys = key.new_zeros(*shape, key.shape[-1])
        entries = Entries(
            keys=keys,
            values=value.new_zeros(*shape, value.shape[-1]),
            scores=numbers("attention" in needs),
            born=numbers(self.window is not None or "position" in needs),
            log_mass=numbers(config.has_mass and budget.fused > 0),
            rotated=torch.zeros_like(keys) if config.positions == "slot" else None,
            queries=keys.new_zeros(*shape, query_size) if self.needs_queries else None,
        )
        self.hold(entries)
        self.is_initialized = True

    @property
    def needs_queries(self) -> bool:
        """Whether the queries of tokens are kept for the compressor."""
        is_blended = Budget.of(self.config, self.window).fused > 0
        return is_blended and get_compressor(self.config.compressor).needs_queries

    def tokens(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, rotary: RotaryTable | None
    ) -> Entries:
        """The tokens of a call as entries.

        Parameters
        ----------
        query : torch.Tensor
            (batch, heads, tokens, head_dim), rotated.
        key, value : torch.Tensor
            (batch, kv_heads, tokens, head_dim), keys rotated.
        rotary : RotaryTable, optional
            None where keys are not rotated, or stay as they came (``positions="absolute"``).
        """
        if not self.is_initialized:
            self.make_buffers(key, value, query.shape[1] // key.shape[1] * query.shape[3])
        self._settle(rotary)
        shape = (*key.shape[:2], plan.places.shape[1])
        return Entries(
            keys=key if rotary is None else rotary.rotate(key, plan.entries, inverse=True),
            values=value,
            scores=key.new_zeros(()).expand(shape),
            born=plan.places[:, None].expand(shape),
            log_mass=key.new_zeros(()).expand(shape),
            rotated=key,
            queries=by_group(query, key.shape[1]) if self.needs_queries else None,
        )

    def append(self, segment: Segment, tokens: Entries) -> None:
        """Write a segment of the call's tokens into its entries."""
        self._catch_up()
        in_place = not torch.is_grad_enabled()
        self.make_writable(in_place)
        self.is_in_graph = not in_place
        self.hold(self.entries.combine(tokens, lambda memory, new: segment.write(memory, new, in_place)))

    def begin_steps(self, plan: Plan) -> None:
        """Make ready for tokens that come one by one and are written by ``StepBuffers``; without gradients."""
        self._catch_up()
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

    def mass_bias(self, head: Compressor | None, stop: int | None = None) -> torch.Tensor | None:
        """(batch, kv_heads, entries up to ``stop``) bias on the logits by what entries stand for; None: no bias."""
        log_mass = self.entries.log_mass
        if log_mass is None or head is None or head.is_closed:
            return None
        return head.mass_bias(log_mass[:, :, :stop])

    def make_writable(self, in_place: bool = True) -> None:
        """Copy the buffers where a graph, or inference mode, forbids to write to them."""
        # A graph may hold buffers that need no gradient themselves: the query's gradient needs keys and values.
        is_needed_by_graph = in_place and self.is_in_graph
        if is_needed_by_graph or is_locked(self.values):
            self.map(lambda tensor: tensor.detach().clone())

    def compress(self, compression: Compression, head: Compressor | None, rotary: RotaryTable | None) -> None:
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

    def close(self, segment: Segment, head: Compressor | None, rotary: RotaryTable | None) -> None:
        """Compress what a segment has completed, and let attention of the past count less from then on.

        With gradients both are put off until something is written next.
        """
        if torch.is_grad_enabled():
            self._due = (segment, head, rotary)
        else:
            self._close(segment, head, rotary)

    def _close(self, segment: Segment, head: Compressor | None, rotary: RotaryTable | None) -> None:
        for compression in segment.compressions:
            self.compress(compression, head, rotary)
        scores, per_token = self.entries.scores, self.config.score_fade
        if scores is not None and per_token < 1 and segment.ends_block:
            scores.mul_(segment.fading(per_token))

    def _catch_up(self) -> None:
        if self._due is not None:
            due, self._due = self._due, None
            self.make_writable(in_place=not torch.is_grad_enabled())
            self._close(*due)

    def buffers(self) -> list[torch.Tensor]:
        """Every buffer there is."""
        if not self.is_initialized:
            return []
        return [tensor for tensor in self.entries.tensors() if tensor is not None]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put a function of every buffer in its place."""
        self._catch_up()
        if self.is_initialized:
            self.hold(self.entries.map(function))

    def reset(self) -> None:
        """Forget everything, keep the buffers."""
        self._due = None
        if self.is_initialized:
            self.make_writable()
            self.map(torch.Tensor.zero_)
        self.is_in_graph, self._rotated_from = False, None

    def detach(self) -> None:
        """Cut the graph: back-propagation ends here, before the compression of a block that is complete."""
        if self.is_initialized:
            self.hold(self.entries.map(torch.Tensor.detach))
        self.is_in_graph = False


def is_locked(tensor: torch.Tensor) -> bool:
    """Whether it was made in inference mode and may not be written to any more."""
    return tensor.is_inference() and not torch.is_inference_mode_enabled()
