"""What a layer remembers of many texts, a page of bytes each: texts are read one by one, single tokens at once."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from lococo.attention import LayerReading, read_layer
from lococo.cache.buffers import HeadGroup, LayerModules, group_heads, make_entries
from lococo.cache.layer import LayerCache
from lococo.cache.plan import Plan, RowState, plan_call, upload
from lococo.compression.codes import Codec, mixtures, products
from lococo.compression.entries import ENTRY_FIELDS, Entries, by_group
from lococo.config import LoCoCoConfig
from lococo.kernels.attention import triton_takes
from lococo.kernels.trials import TRITON, DecodeTrial

ALIGNMENT = 16  # bytes
HIDDEN = float("-inf")
COPIED = 2**21  # bytes of pages


def _forget(tensor: torch.Tensor, page: int) -> torch.Tensor:
    """Overwrite what another text left in a page."""
    return tensor[page].zero_()


class Field(NamedTuple):
    """A tensor of a page."""

    name: str
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def stop(self) -> int:
        """Where its bytes end."""
        return self.start + math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class PageLayout:
    """Where everything lies in a page: slots and open block of all KV heads of a layer, of constant size.

    Attributes
    ----------
    groups : tuple of HeadGroup
    codec : Codec, optional
    fields : tuple of Field
    """

    groups: tuple[HeadGroup, ...]
    codec: Codec | None
    fields: tuple[Field, ...]

    @classmethod
    def of(
        cls,
        configs: Sequence[LoCoCoConfig],
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        network: torch.nn.Module | None = None,
    ) -> PageLayout:
        """The layout for KV heads with these configs, and as many query heads in all."""
        groups = group_heads(configs)
        shape = (1, 0, head_dim)
        query, key = (torch.zeros(1, heads, *shape[1:], dtype=dtype) for heads in (num_heads, len(configs)))
        entries, codec = make_entries(groups, None, query, key, key, network)
        held = entries if codec is None else codec.encoded(entries)
        fields: list[Field] = []
        start = 0
        for name, tensor in zip(ENTRY_FIELDS, held.tensors(), strict=True):
            if tensor is not None:
                fields.append(Field(name, start, tuple(tensor.shape[1:]), tensor.dtype))
                start = _aligned(fields[-1].stop)
        return cls(groups, codec, tuple(fields))

    @property
    def nbytes(self) -> int:
        """Bytes of a page."""
        return _aligned(self.fields[-1].stop)

    @property
    def num_entries(self) -> int:
        """Entries of all KV heads."""
        return self.groups[-1].stop

    def entries(self, pages: torch.Tensor) -> Entries:
        """Views of all pages.

        Parameters
        ----------
        pages : torch.Tensor
            (pages, ``nbytes`` or more) in uint8.

        Returns
        -------
        Entries
            (pages, entries of all KV heads, ...).
        """
        views = {
            field.name: pages[:, field.start : field.stop].view(field.dtype).unflatten(1, field.shape)
            for field in self.fields
        }
        return Entries(**views)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def row_state(seen: int, block_size: int) -> RowState:
    """How far a text has been read after so many tokens: nothing but the page has to be kept for it."""
    pending = (seen - 1) % block_size + 1 if seen else 0
    return RowState(seen - pending, pending, pending == block_size)


@dataclasses.dataclass
class StepBatch:
    """Texts that read one token each, shared by all layers.

    Attributes
    ----------
    pages : torch.Tensor
        (texts,), the page of each.
    seen : torch.Tensor
        (texts, 1), tokens read before.
    rows : tuple of RowState
        Before the token.
    closing : tuple of int
        Texts whose block is complete.
    fresh : tuple of int
        Texts that begin.
    closed, pending : torch.Tensor
        (texts, 1) of the row states when the token is written.
    """

    pages: torch.Tensor
    seen: torch.Tensor
    rows: tuple[RowState, ...]
    closing: tuple[int, ...]
    fresh: tuple[int, ...]
    closed: torch.Tensor
    pending: torch.Tensor
    plans: dict[int, Plan] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, pages: torch.Tensor, seen: Sequence[int], block_size: int) -> StepBatch:
        """For texts in (texts,) pages, of which so many tokens were read."""
        rows = tuple(row_state(each, block_size) for each in seen)
        after = [row.with_block_closed() for row in rows]
        table = torch.tensor([seen, [row.closed for row in after], [row.pending for row in after]])
        table = upload(table, pages.device)[..., None]
        return cls(
            pages=pages,
            seen=table[0],
            rows=rows,
            closing=tuple(index for index, row in enumerate(rows) if row.is_complete),
            fresh=tuple(index for index, each in enumerate(seen) if not each),
            closed=table[1],
            pending=table[2],
        )

    def plan_for(self, config: LoCoCoConfig) -> Plan:
        """Of the texts whose block is complete, up to the token."""
        if config.num_slots not in self.plans:
            rows = [self.rows[index] for index in self.closing]
            self.plans[config.num_slots] = plan_call(rows, 1, config, device=self.pages.device)
        return self.plans[config.num_slots]


class PagedLayer:
    """A layer whose memory lies in pages that somebody else owns.

    Parameters
    ----------
    config : LoCoCoConfig
        Of the model.
    layer_idx : int
    layout : PageLayout
    num_heads : int
        Query heads.
    pages : torch.Tensor
        (pages, bytes) in uint8.
    modules : LayerModules
        What the layer computes its memory with.
    scale : float
        Factor on ``query @ key``.
    softcap : float, optional
        As in ``LogitBias``.
    """

    def __init__(
        self,
        config: LoCoCoConfig,
        layer_idx: int,
        layout: PageLayout,
        num_heads: int,
        pages: torch.Tensor,
        modules: LayerModules,
        scale: float,
        softcap: float | None = None,
    ) -> None:
        self.config, self.layer_idx, self.layout, self.num_heads = config, layer_idx, layout, num_heads
        self.modules, self.scale, self.softcap = modules, scale, softcap
        self.entries = layout.entries(pages)
        # What attention needs of it.
        apart = dict.fromkeys(("scores", "position", "log_mass", "queries", "features"))
        self._read = dataclasses.replace(self.entries, **apart)  # type: ignore[arg-type]
        device, groups = pages.device, layout.groups
        by_head = sorted(
            (head, group.start + place * group.config.capacity, group.config)
            for group in groups
            for place, head in enumerate(group.heads)
        )
        self.first = upload(torch.tensor([start for _, start, _ in by_head]), device)
        self.slots = upload(torch.tensor([each.num_slots for _, _, each in by_head]), device)
        owner = [head for group in groups for head in group.heads for _ in range(group.config.capacity)]
        self.owner = upload(torch.tensor(owner), device)
        self.index = torch.arange(layout.num_entries, device=device)
        self.of_query = torch.arange(num_heads, device=device)[:, None] // (num_heads // len(by_head))
        self.delay: int | torch.Tensor = groups[0].config.score_delay
        if any(group.config.score_delay != self.delay for group in groups):
            self.delay = upload(torch.tensor([each.score_delay for _, _, each in by_head]), device)[self.owner]

    def read(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        page: int,
        seen: int,
        plans: dict[int, Plan] | None = None,
    ) -> torch.Tensor:
        """Attention of a piece of a text, which its page holds afterwards.

        Parameters
        ----------
        query : torch.Tensor
            (tokens, heads, head_dim), rotated.
        key, value : torch.Tensor
            (tokens, kv_heads, head_dim), keys rotated.
        page : int
        seen : int
            Tokens of the text read before.
        plans : dict, optional
            Plans of this piece by number of slots, filled here for other layers.

        Returns
        -------
        torch.Tensor
            (tokens, heads, head_dim).
        """
        mine = self.entries.map(lambda tensor: tensor[page : page + 1])
        if not seen:
            self.entries.map(functools.partial(_forget, page=page))
        plans = {} if plans is None else plans

        def plan_for(config: LoCoCoConfig) -> Plan:
            if config.num_slots not in plans:
                row = row_state(seen, config.block_size)
                plan = plan_call([row], query.shape[0], config, device=query.device)
                plans[config.num_slots] = dataclasses.replace(plan, is_step=False)
            return plans[config.num_slots]

        reading = LayerReading(plan_for, self.scale, self.modules, softcap=self.softcap)
        states = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        return read_layer(self._over(mine), reading, *states)[0].transpose(0, 1)

    def step(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        """Attention of one token of every text of a batch, which their pages hold afterwards.

        Parameters
        ----------
        query : torch.Tensor
            (texts, heads, head_dim), rotated.
        key, value : torch.Tensor
            (texts, kv_heads, head_dim), keys rotated.

        Returns
        -------
        torch.Tensor
            (texts, heads, head_dim).
        """
        for index in batch.fresh:
            self.entries.map(functools.partial(_forget, page=int(batch.pages[index])))
        if batch.closing:
            self._close(batch)
        at = self.first + torch.minimum(batch.closed, self.slots) + batch.pending  # (texts, kv_heads)
        self._write(query, key, value, batch, at)
        # Copies of pages that stay in a processor's cache are attended to in far less time.
        each = max(1, COPIED // self.layout.nbytes) if query.device.type == "cpu" else len(query)
        pieces = zip(query.split(each), batch.pages.split(each), at.split(each), strict=True)
        outputs = [self._attend(*piece) for piece in pieces]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend(self, query: torch.Tensor, pages: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """(texts, heads, head_dim) of as many queries, each the last of its text."""
        last = at[:, self.owner]  # (texts, entries)
        bias = query.new_zeros(last.shape)
        head, log_mass = self.modules.head, self.entries.log_mass
        if log_mass is not None and head is not None and not head.is_closed:
            bias = head.mass_bias(log_mass.index_select(0, pages)[:, None])[:, 0].to(bias.dtype)
        bias = bias.masked_fill(self.index > last, HIDDEN)
        result = self._in_triton(query, pages, at, bias) if self.softcap is None and triton_takes(query) else None
        output, received = self._in_torch(query, pages, bias) if result is None else result
        if self.entries.scores is not None:
            assert received is not None
            self.entries.scores.index_add_(0, pages, received * (self.index + self.delay <= last))
        return output

    def _in_torch(
        self, query: torch.Tensor, pages: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output, and the (texts, entries) attention received, if scores want it."""
        held = self._read.map(lambda tensor: tensor.index_select(0, pages))
        wide = torch.promote_types(query.dtype, torch.float32)
        probabilities = self._logits(query, held, bias).softmax(dim=-1, dtype=wide)
        output = self._mix(probabilities, held, query.dtype)
        if self.entries.scores is None:
            return output, None
        received = probabilities.square_() if self.config.score_power == 2 else probabilities
        return output, received.sum(dim=-2).flatten(1)

    def _in_triton(
        self, query: torch.Tensor, pages: torch.Tensor, at: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """The same by a kernel that reads pages where they are; None where it cannot."""
        entries, size = self.entries, query.shape[-1]
        codec = self.layout.codec or Codec((16, 16), (size, size), (query.dtype, query.dtype))
        how = (entries.scores is not None, self.config.score_power == 2)
        trial = DecodeTrial(
            query.device, query.dtype, size, codec, len(self.of_query) // len(self.first), True, *how, True
        )
        held = (entries.keys, entries.keys_range, entries.values, entries.values_range)
        return TRITON.run(trial, query, *held, codec, bias, at, self.scale, self.first, *how, pages)

    def _by_head(self, tensor: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Heads with the same budget apart, each with its own entries and queries; others share one row."""
        return tensor.unflatten(dim, (len(self.first), -1)) if len(self.layout.groups) == 1 else tensor

    def _logits(self, query: torch.Tensor, held: Entries, bias: torch.Tensor) -> torch.Tensor:
        """(texts, heads, entries) with slots per head; else (texts, kv_heads, groups, entries of a head)."""
        codec, (query, keys) = self.layout.codec, map(self._by_head, (query, held.keys))
        if held.keys_range is None or codec is None:
            logits = query @ keys.mT
        else:
            logits = products(query, keys, self._by_head(held.keys_range), codec.bits[0])
        logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if len(self.layout.groups) == 1:
            return logits + self._by_head(bias)[:, :, None]
        return logits + torch.where(self.owner == self.of_query, bias[:, None], HIDDEN)

    def _mix(self, probabilities: torch.Tensor, held: Entries, dtype: torch.dtype) -> torch.Tensor:
        codec, values = self.layout.codec, self._by_head(held.values)
        if held.values_range is None or codec is None:
            output = probabilities.to(dtype) @ values
        else:
            how = (codec.bits[1], codec.sizes[1], dtype)
            output = mixtures(probabilities, values, self._by_head(held.values_range), *how)
        return output.flatten(1, 2) if len(self.layout.groups) == 1 else output

    def _write(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: StepBatch, at: torch.Tensor
    ) -> None:
        codec, entries, places = self.layout.codec, self.entries, (batch.pages[:, None], at)
        coded = [(key, None), (value, None)] if codec is None else codec.coded(key, value)
        for name, (tensor, span) in zip(("keys", "values"), coded, strict=True):
            getattr(entries, name)[places] = tensor
            if span is not None:
                getattr(entries, f"{name}_range")[places] = span
        if entries.scores is not None:  # a token's log-mass is 0, as that of the one before it there
            entries.scores[places] = 0.0
        if entries.position is not None:
            entries.position[places] = batch.seen.to(entries.position.dtype).expand_as(at)
        if entries.queries is not None:
            entries.queries[places] = by_group(query[:, :, None], key.shape[1])[:, :, 0]
        if entries.features is not None:
            entries.features[places] = self._features(key, value, batch).to(entries.features.dtype)

    def _features(self, key: torch.Tensor, value: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        """(texts, kv_heads, num_features) of the tokens."""
        network, rotary, codec = self.modules.network, self.modules.rotary, self.layout.codec
        assert network is not None
        if codec is not None:
            (key, _), (value, _) = codec.rounded(key, value)
        keys, values = key[:, :, None], value[:, :, None]
        keys = keys if rotary is None else rotary.rotate(keys, batch.seen, inverse=True)
        return network(keys, values)[:, :, 0]

    def _close(self, batch: StepBatch) -> None:
        """Compress the blocks that are complete."""
        pages = batch.pages if len(batch.closing) == len(batch.rows) else batch.pages[list(batch.closing)]
        layer = self._over(self.entries.map(lambda tensor: tensor.index_select(0, pages)))
        views = layer.begin_call(batch.plan_for(self.config), self.modules)
        for view in views:
            view.close_block(batch.plan_for(view.config).segments[0], self.modules)
        layer.end_call(views)
        assert layer.entries is not None
        self.entries.combine(layer.entries, lambda held, new: held.index_copy_(0, pages, new))

    def _over(self, entries: Entries) -> LayerCache:
        return LayerCache.over(
            entries, self.config, self.layer_idx, self.layout.groups, self.num_heads, self.layout.codec
        )
