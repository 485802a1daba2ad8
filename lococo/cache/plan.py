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
class Row:
    """How far a row has been read: tokens in blocks that are complete, and in its open block.

    It does not depend on the number of slots, so heads with budgets of their own share it.
    """

    closed: int = 0
    pending: int = 0

    @property
    def seen(self) -> int:
        """Tokens in all."""
        return self.closed + self.pending

    def entries(self, num_slots: int) -> int:
        """Entries in use, slots and open block: the place of the next token."""
        return min(self.closed, num_slots) + self.pending

    def read(self, tokens: int, limit: int, num_slots: int) -> tuple[Row, int, int]:
        """The row after some tokens, none past the end of the block.

        Returns
        -------
        tuple
            The row, the length of the block that is complete now (or 0), and the entries to compress (or 0).
        """
        row = Row(self.closed, self.pending + tokens)
        if row.pending < limit:
            return row, 0, 0
        entries = row.entries(num_slots)
        return Row(row.seen), row.pending, entries if entries > num_slots else 0


@dataclasses.dataclass(frozen=True)
class Compression:
    """Rows whose first ``entries`` entries become M slots after a segment. ``rows`` is None for the whole batch."""

    entries: int
    now: int | torch.Tensor
    rows: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class AlignedSegment:
    """Tokens at the same columns and entries in every row. ``closes``: length of the block they complete."""

    columns: slice
    start: int
    closes: int
    compressions: tuple[Compression, ...]

    @property
    def width(self) -> int:
        """Queries per row."""
        return self.columns.stop - self.columns.start

    @property
    def ends_block(self) -> bool:
        """Whether a block is complete after it."""
        return self.closes > 0

    @property
    def stop(self) -> int:
        """Entries that the last query sees."""
        return self.start + self.width

    def fading(self, per_token: float) -> float:
        """Factor by which a block's length fades what was before its end; 1 where no block ends."""
        return per_token**self.closes

    def take(self, tokens: torch.Tensor) -> torch.Tensor:
        """The segment's part of (batch, heads, tokens, d)."""
        return tokens[:, :, self.columns]

    def write(self, memory: torch.Tensor, tokens: torch.Tensor, in_place: bool) -> torch.Tensor:
        """Put the segment's part of (batch, heads, tokens, ...) into (batch, heads, capacity, ...)."""
        part = tokens[:, :, self.columns].to(memory.dtype)
        if in_place:
            memory[:, :, self.start : self.stop] = part
            return memory
        return torch.slice_scatter(memory, part, dim=2, start=self.start, end=self.stop)


@dataclasses.dataclass(frozen=True)
class RaggedSegment:
    """Tokens at columns and entries of their own in every row; a row may have none."""

    rows: torch.Tensor  # (tokens,), row of each token
    columns: torch.Tensor  # (tokens,), its column in the call
    places: torch.Tensor  # (tokens,), its place among its row's queries
    entries: torch.Tensor  # (tokens,), the entry it goes to
    starts: torch.Tensor  # (batch, 1), first entry of each row's segment
    counts: torch.Tensor  # (batch, 1), tokens of each row
    closes: torch.Tensor  # (batch, 1, 1), length of the block that a row completes, else 0
    ends_block: bool  # in any row
    width: int
    stop: int
    batch: int
    compressions: tuple[Compression, ...]

    def fading(self, per_token: float) -> torch.Tensor:
        """(batch, 1, 1) factors by which a block's length fades what was before its end; 1 where no block ends."""
        return per_token**self.closes

    def take(self, tokens: torch.Tensor) -> torch.Tensor:
        """The rows' parts of (batch, heads, tokens, d), left-aligned and zero-padded to ``width``."""
        part = tokens.new_zeros(self.batch, self.width, tokens.shape[1], tokens.shape[3])
        part = part.index_put((self.rows, self.places), tokens.transpose(1, 2)[self.rows, self.columns])
        return part.transpose(1, 2)

    def write(self, memory: torch.Tensor, tokens: torch.Tensor, in_place: bool) -> torch.Tensor:
        """Put the rows' parts of (batch, heads, tokens, ...) into (batch, heads, capacity, ...)."""
        part = tokens.transpose(1, 2)[self.rows, self.columns].to(memory.dtype)
        by_entry = memory.transpose(1, 2)
        if in_place:
            by_entry[self.rows, self.entries] = part
            return memory
        return by_entry.index_put((self.rows, self.entries), part).transpose(1, 2)

    def put(self, output: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """(batch, heads, tokens, d) with the rows' results (batch, heads, width, d) at their columns."""
        results = part.transpose(1, 2)[self.rows, self.places]
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

    ``is_step``: it is one token for every row, in whose place the segments need not be looked at. Not where rows that
    differ move their keys to their places in the cache.
    """

    segments: tuple[Segment, ...]
    rows: tuple[Row, ...]
    entries: torch.Tensor  # (1 or batch, tokens), the entry of each token: its position with positions="slot"
    places: torch.Tensor  # (1 or batch, tokens), each token's place in its row's text
    is_step: bool = False

    @property
    def ends_block(self) -> bool:
        """Whether a block is complete after it."""
        return any(segment.ends_block for segment in self.segments)

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
        return self if device == self.places.device else _moved(self, device)


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
    rows: Sequence[Row],
    num_tokens: int,
    config: LoCoCoConfig,
    real: Sequence[Sequence[bool]] | None = None,
    device: torch.device | str = "cpu",
) -> Plan:
    """Cut a call into segments.

    Parameters
    ----------
    rows : sequence of Row
        State before the call: one for the whole batch while no row has had padding, else one per row.
    num_tokens : int
        Columns of the call.
    real : sequence of sequences of bool, optional
        (batch, num_tokens), False for padding. None: no padding in this call.
    """
    limit = config.block_size
    if num_tokens == 1 and config.decode_block_size is not None:
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
    return dataclasses.replace(plan, is_step=is_step and not moves_apart)


def _plan_aligned(row: Row, num_tokens: int, num_slots: int, limit: int, device: torch.device | str) -> Plan:
    segments, entries, column = [], [], 0
    places = torch.arange(row.seen, row.seen + num_tokens, device=device)[None]
    while column < num_tokens:
        tokens = min(max(limit - row.pending, 1), num_tokens - column)
        start = row.entries(num_slots)
        row, closes, overfull = row.read(tokens, limit, num_slots)
        compressions = (Compression(overfull, row.seen),) if overfull else ()
        segments.append(AlignedSegment(slice(column, column + tokens), start, closes, compressions))
        entries.append(torch.arange(start, start + tokens, device=device))
        column += tokens
    return Plan(tuple(segments), (row,), torch.cat(entries)[None], places)


def _plan_ragged(
    rows: Sequence[Row], real: Sequence[Sequence[bool]], num_slots: int, limit: int, device: torch.device | str
) -> Plan:
    state = list(rows)
    waiting = [[column for column, is_real in enumerate(flags) if is_real] for flags in real]
    entries = torch.zeros(len(real), len(real[0]), dtype=torch.long)
    places = torch.zeros_like(entries)
    segments = []
    while any(waiting):
        before, tokens, closes, overfull = list(state), [], [], []
        for index, row in enumerate(before):
            count = min(max(limit - row.pending, 1), len(waiting[index]))
            for place, column in enumerate(waiting[index][:count]):
                tokens.append((index, column, place, row.entries(num_slots) + place))
                entries[index, column] = row.entries(num_slots) + place
                places[index, column] = row.seen + place
            waiting[index] = waiting[index][count:]
            state[index], closed, full = row.read(count, limit, num_slots) if count else (row, 0, 0)
            closes.append(closed)
            overfull.append(full)
        starts = [row.entries(num_slots) for row in before]
        segments.append(_ragged_segment(tokens, starts, closes, _compressions(overfull, state, device), device))
    return Plan(tuple(segments), tuple(state), upload(entries, device), upload(places, device))


def _ragged_segment(
    tokens: list[tuple[int, int, int, int]],
    starts: list[int],
    closes: list[int],
    compressions: tuple[Compression, ...],
    device: torch.device | str,
) -> RaggedSegment:
    table = torch.tensor(tokens).T
    counts = torch.bincount(table[0], minlength=len(starts))
    row_of, column, place, entry = upload(table, device)
    return RaggedSegment(
        rows=row_of,
        columns=column,
        places=place,
        entries=entry,
        starts=upload(torch.tensor(starts)[:, None], device),
        counts=upload(counts[:, None], device),
        closes=upload(torch.tensor(closes), device)[:, None, None],
        ends_block=any(closes),
        width=int(counts.max()),
        stop=int(table[3].max()) + 1,
        batch=len(starts),
        compressions=compressions,
    )


def _compressions(overfull: list[int], state: list[Row], device: torch.device | str) -> tuple[Compression, ...]:
    groups = []
    for entries in sorted(set(overfull) - {0}):
        members = [index for index, count in enumerate(overfull) if count == entries]
        now = upload(torch.tensor([state[index].seen for index in members]), device)[:, None, None]
        groups.append(Compression(entries, now, upload(torch.tensor(members), device)))
    return tuple(groups)


def upload(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A tensor on the device; from the host by pinned memory, so that the host does not wait for a GPU."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
