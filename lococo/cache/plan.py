"""Cutting a call into segments: which token of which row is read when, and into which entry it goes.

Everything here is host-side bookkeeping, done once per forward and shared by all layers. Every row keeps its own
block boundaries, counted in its own tokens, so neither padding nor the way a text is split over calls moves them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from lococo.config import LoCoCoConfig


@dataclasses.dataclass(frozen=True)
class RowState:
    """How far a row has been read: tokens in blocks that are compressed, and in the block after them.

    It does not depend on the number of slots, so heads with budgets of their own share it. A complete block is
    compressed before the next token is written, never sooner: with gradients or without, in whatever calls it came.
    """

    closed: int = 0
    pending: int = 0
    is_complete: bool = False  # the block after those that are closed

    @property
    def seen(self) -> int:
        """Tokens in all."""
        return self.closed + self.pending

    def num_entries(self, num_slots: int) -> int:
        """Entries in use, slots and block."""
        return min(self.closed, num_slots) + self.pending

    def with_block_closed(self) -> RowState:
        """The row when a token can be written: a complete block is closed."""
        return RowState(self.seen) if self.is_complete else self

    def after(self, tokens: int, limit: int) -> RowState:
        """The row after some tokens, none past the end of a block of ``limit`` tokens."""
        pending = self.pending + tokens
        return RowState(self.closed, pending, pending >= limit)


@dataclasses.dataclass(frozen=True)
class Compression:
    """Rows whose first ``num_entries`` entries become M slots.

    Attributes
    ----------
    seen : int or torch.Tensor
        Tokens read so far; (rows, 1, 1) where rows differ.
    rows : torch.Tensor, optional
        None for the whole batch.
    """

    num_entries: int
    seen: int | torch.Tensor
    rows: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class AlignedSegment:
    """Tokens at the same columns and entries in every row.

    Attributes
    ----------
    start : int
        Entry of the first token.
    block_end : int
        Length of the block that is closed before the segment is written; 0: none is.
    compressions : tuple of Compression
        To be done before it is written.
    """

    columns: slice
    start: int
    block_end: int
    compressions: tuple[Compression, ...]

    @property
    def width(self) -> int:
        """Queries per row."""
        return self.columns.stop - self.columns.start

    @property
    def closes_block(self) -> bool:
        """Whether a block is closed before it."""
        return self.block_end > 0

    @property
    def stop(self) -> int:
        """Entries that the last query sees."""
        return self.start + self.width

    def fading(self, per_token: float) -> float:
        """Factor by which the length of a closed block fades what its tokens summed; 1 where none is closed."""
        return per_token**self.block_end

    def take(self, tokens: torch.Tensor) -> torch.Tensor:
        """The segment's part of (batch, heads, tokens, d)."""
        return tokens[:, :, self.columns]

    def write(self, buffer: torch.Tensor, tokens: torch.Tensor, in_place: bool) -> torch.Tensor:
        """Put the segment's part of (batch, heads, tokens, ...) into (batch, heads, capacity, ...)."""
        part = tokens[:, :, self.columns].to(buffer.dtype)
        if in_place:
            buffer[:, :, self.start : self.stop] = part
            return buffer
        return torch.slice_scatter(buffer, part, dim=2, start=self.start, end=self.stop)


@dataclasses.dataclass(frozen=True)
class RaggedSegment:
    """Tokens at columns and entries of their own in every row, where a row may have none."""

    rows: torch.Tensor  # (tokens,), row of each token
    columns: torch.Tensor  # (tokens,), its column in the call
    query_index: torch.Tensor  # (tokens,), its number among its row's queries
    cache_positions: torch.Tensor  # (tokens,), the entry it goes to
    starts: torch.Tensor  # (batch, 1), first entry of each row's segment
    counts: torch.Tensor  # (batch, 1), tokens of each row
    block_end: torch.Tensor  # (batch, 1, 1), length of the block that is closed in a row, else 0
    closes_block: bool  # in any row
    width: int
    stop: int
    batch: int
    compressions: tuple[Compression, ...]

    def fading(self, per_token: float) -> torch.Tensor:
        """(batch, 1, 1) factors, as in ``AlignedSegment``."""
        return per_token**self.block_end

    def take(self, tokens: torch.Tensor) -> torch.Tensor:
        """The rows' parts of (batch, heads, tokens, d), left-aligned and zero-padded to ``width``."""
        part = tokens.new_zeros(self.batch, self.width, tokens.shape[1], tokens.shape[3])
        part = part.index_put((self.rows, self.query_index), tokens.transpose(1, 2)[self.rows, self.columns])
        return part.transpose(1, 2)

    def write(self, buffer: torch.Tensor, tokens: torch.Tensor, in_place: bool) -> torch.Tensor:
        """Put the rows' parts of (batch, heads, tokens, ...) into (batch, heads, capacity, ...)."""
        part = tokens.transpose(1, 2)[self.rows, self.columns].to(buffer.dtype)
        by_entry = buffer.transpose(1, 2)
        if in_place:
            by_entry[self.rows, self.cache_positions] = part
            return buffer
        return by_entry.index_put((self.rows, self.cache_positions), part).transpose(1, 2)

    def put(self, output: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """(batch, heads, tokens, d) with the rows' results (batch, heads, width, d) at their columns."""
        results = part.transpose(1, 2)[self.rows, self.query_index]
        return output.transpose(1, 2).index_put((self.rows, self.columns), results).transpose(1, 2)

    def queries(self) -> torch.Tensor:
        """(batch, 1, width), True where a row has a token."""
        return (torch.arange(self.width, device=self.counts.device) < self.counts)[:, None]

    def visible(self, delay: int = 0) -> torch.Tensor:
        """(batch, 1, width, stop), True where a query is at least ``delay`` after an entry; 0: all that it sees."""
        last = self.starts + torch.arange(self.width, device=self.starts.device)  # (batch, width)
        return (torch.arange(self.stop, device=self.starts.device) <= last[..., None] - delay)[:, None]


Segment = AlignedSegment | RaggedSegment


@dataclasses.dataclass(frozen=True)
class Plan:
    """The segments of one call and the rows after it.

    Attributes
    ----------
    before, rows : tuple of RowState
        Before and after the call: one for the whole batch, or one per row.
    cache_positions : torch.Tensor
        (1 or batch, tokens), the entry of each token: its position with ``positions="slot"``.
    positions : torch.Tensor
        (1 or batch, tokens), each token's place in its row's text.
    is_step : bool
        It is one token for every row, which decoding can write by itself. Not where rows that differ move their keys
        to their places in the cache.
    """

    segments: tuple[Segment, ...]
    rows: tuple[RowState, ...]
    cache_positions: torch.Tensor
    positions: torch.Tensor
    is_step: bool = False
    before: tuple[RowState, ...] = ()

    @property
    def closes_block(self) -> bool:
        """Whether a block is closed before its first segment."""
        return bool(self.segments) and self.segments[0].closes_block

    def assemble(self, parts: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """The segments' results (batch, heads, width, d) as one (batch, heads, tokens, d), zero for padding."""
        ragged = [segment for segment in self.segments if isinstance(segment, RaggedSegment)]
        if parts and not ragged:
            return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim=2)
        output = torch.zeros_like(like)
        for segment, part in zip(ragged, parts, strict=True):
            output = segment.put(output, part)
        return output

    def to(self, device: torch.device) -> Plan:
        """The same plan with its tensors on a device."""
        return self if device == self.positions.device else _moved(self, device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = {field.name: _moved(getattr(value, field.name), device) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **changes)
    return value


def plan_call(
    rows: Sequence[RowState],
    num_tokens: int,
    config: LoCoCoConfig,
    real: Sequence[Sequence[bool]] | None = None,
    device: torch.device | str = "cpu",
    is_piece: bool = False,
) -> Plan:
    """Cut a call into segments.

    Parameters
    ----------
    rows : sequence of RowState
        State before the call: one for the whole batch while no row has had padding, else one per row.
    num_tokens : int
        Columns of the call.
    real : sequence of sequences of bool, optional
        (batch, num_tokens), False for padding. None: no padding in this call.
    is_piece : bool
        It is a piece of a longer call: a single token is not one that was generated.
    """
    limit = config.block_size
    if num_tokens == 1 and not is_piece and config.decode_block_size is not None:
        limit = config.decode_block_size
    if real is None and len(set(rows)) == 1:
        plan = _plan_aligned(rows[0], num_tokens, config.num_slots, limit, device)
        plan = dataclasses.replace(plan, rows=plan.rows * len(rows))
    else:
        if real is None:
            real = [[True] * num_tokens] * len(rows)
        if len(rows) == 1:
            rows = list(rows) * len(real)
        plan = _plan_ragged(rows, real, config.num_slots, limit, device)
    is_step = num_tokens == 1 and (real is None or all(map(all, real)))
    moves_apart = config.positions == "slot" and any(isinstance(each, RaggedSegment) for each in plan.segments)
    return dataclasses.replace(plan, is_step=is_step and not moves_apart, before=tuple(rows))


def _plan_aligned(row: RowState, num_tokens: int, num_slots: int, limit: int, device: torch.device | str) -> Plan:
    segments, cache_positions, column = [], [], 0
    positions = torch.arange(row.seen, row.seen + num_tokens, device=device)[None]
    while column < num_tokens:
        block_end, overfull, row = _close(row, num_slots)
        tokens = min(max(limit - row.pending, 1), num_tokens - column)
        start = row.num_entries(num_slots)
        compressions = (Compression(overfull, row.seen),) if overfull else ()
        segments.append(AlignedSegment(slice(column, column + tokens), start, block_end, compressions))
        cache_positions.append(torch.arange(start, start + tokens, device=device))
        row, column = row.after(tokens, limit), column + tokens
    return Plan(tuple(segments), (row,), torch.cat(cache_positions)[None], positions)


def _close(row: RowState, num_slots: int) -> tuple[int, int, RowState]:
    """Length of a complete block (or 0), entries to compress (or 0), and the row with the block closed."""
    if not row.is_complete:
        return 0, 0, row
    held = row.num_entries(num_slots)
    return row.pending, held if held > num_slots else 0, row.with_block_closed()


def _plan_ragged(
    rows: Sequence[RowState], real: Sequence[Sequence[bool]], num_slots: int, limit: int, device: torch.device | str
) -> Plan:
    state = list(rows)
    waiting = [torch.tensor(flags).nonzero()[:, 0] for flags in real]  # columns of each row's tokens
    cache_positions = torch.zeros(len(real), len(real[0]), dtype=torch.long)
    positions = torch.zeros_like(cache_positions)
    segments = []
    while any(len(columns) for columns in waiting):
        tokens, block_ends, overfull, starts = [], [], [], []
        for index, columns in enumerate(waiting):
            block_end, full, row = _close(state[index], num_slots) if len(columns) else (0, 0, state[index])
            start = row.num_entries(num_slots)
            count = min(max(limit - row.pending, 1), len(columns))
            number = torch.arange(count)
            tokens.append(torch.stack([torch.full_like(number, index), columns[:count], number, start + number]))
            cache_positions[index, columns[:count]] = start + number
            positions[index, columns[:count]] = row.seen + number
            waiting[index] = columns[count:]
            block_ends.append(block_end)
            overfull.append((full, row.seen))
            starts.append(start)
            state[index] = row.after(count, limit) if count else row
        table = torch.cat(tokens, dim=1)
        segments.append(_ragged_segment(table, starts, block_ends, _compressions(overfull, device), device))
    return Plan(tuple(segments), tuple(state), upload(cache_positions, device), upload(positions, device))


def _ragged_segment(
    table: torch.Tensor,
    starts: list[int],
    block_ends: list[int],
    compressions: tuple[Compression, ...],
    device: torch.device | str,
) -> RaggedSegment:
    """A segment of tokens by (row, column, number in the segment, entry), each a row of ``table``."""
    counts = torch.bincount(table[0], minlength=len(starts))
    row_of, column, query_index, entry = upload(table, device)
    return RaggedSegment(
        rows=row_of,
        columns=column,
        query_index=query_index,
        cache_positions=entry,
        starts=upload(torch.tensor(starts)[:, None], device),
        counts=upload(counts[:, None], device),
        block_end=upload(torch.tensor(block_ends), device)[:, None, None],
        closes_block=any(block_ends),
        width=int(counts.max()),
        stop=int(table[3].max()) + 1,
        batch=len(starts),
        compressions=compressions,
    )


def _compressions(overfull: list[tuple[int, int]], device: torch.device | str) -> tuple[Compression, ...]:
    """One for all rows with as many entries, from every row's number of them (or 0) and tokens read."""
    groups = []
    for num_entries in sorted({held for held, _ in overfull} - {0}):
        members = [index for index, (held, _) in enumerate(overfull) if held == num_entries]
        seen = upload(torch.tensor([overfull[index][1] for index in members]), device)[:, None, None]
        groups.append(Compression(num_entries, seen, upload(torch.tensor(members), device)))
    return tuple(groups)


def upload(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A tensor on the device; from the host by pinned memory, so that the host does not wait for a GPU."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
