"""One token after another: a layer's buffers written in place, by operations whose shapes never change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F

from lococo.cache.plan import Plan, upload
from lococo.compression.codes import Codec
from lococo.compression.entries import Entries, by_group
from lococo.kernels.attention import LogitBias, triton_takes
from lococo.kernels.trials import TRITON, DecodeTrial

if TYPE_CHECKING:
    from lococo.cache.buffers import HeadGroup

HIDDEN = float("-inf")


class DecodeBuffers:
    """A layer's buffers while tokens come one by one: every step attends to all that was ever allocated.

    Entries that are not in use yet are hidden by a bias on their logits, so nothing is cut out of a buffer. Where all
    KV heads have the same budget each of them is a row of its own, with the queries of its group. Heads with budgets
    of their own lie one behind the other in a single row per text, which every query reads whole; a bias hides from
    it what is not of its head. That is more arithmetic, but one operation in place of one for each head.

    Parameters
    ----------
    entries : Entries
        (batch, entries of all KV heads, ...), of which these are views.
    groups : sequence of HeadGroup
    num_heads : int
        Query heads.
    codec : Codec, optional
        Where keys and values are held as codes. Torch decodes all of them for every step, a Triton kernel as it reads.

    Attributes
    ----------
    bias : torch.Tensor
        (rows, entries), added to the logits of whoever may see an entry.
    is_current : bool
        Whether they are in line with all that was written by anything but steps; ``sync`` brings them there.
    """

    def __init__(
        self, entries: Entries, groups: Sequence[HeadGroup], num_heads: int, codec: Codec | None = None
    ) -> None:
        self.groups, self.codec = groups, codec
        self.is_split = len(groups) > 1
        if not self.is_split:
            shape = (len(groups[0].heads), groups[0].config.capacity)
            entries = entries.map(lambda tensor: tensor.unflatten(1, shape).flatten(0, 1))
        self.entries = entries
        self.is_current = False
        held = entries.values
        dtype = held.dtype if codec is None else codec.dtypes[1]
        self._wide = torch.promote_types(dtype, torch.float32)
        (rows, num_entries), device = held.shape[:2], held.device
        if self.is_split:
            self._lay_out_heads(num_heads, device)
        self.bias = torch.zeros(rows, num_entries, dtype=dtype, device=device)
        # The entry that the next token of each KV head of a row goes to.
        self._at = torch.zeros(rows, len(self._first) if self.is_split else 1, dtype=torch.long, device=device)
        # Written, never replaced: a recorded step reads them where they are.
        self._position_ahead = self._at.new_zeros(rows, 1)
        self._scored_until: torch.Tensor | None = None
        delay = max(group.config.score_delay for group in groups)
        if delay and entries.scores is not None:
            small = torch.int16 if 2 * num_entries + delay < 2**15 else torch.int32
            self._scored_until = torch.zeros(rows, num_entries, dtype=small, device=device)

    def _lay_out_heads(self, num_heads: int, device: torch.device) -> None:
        """First entry of every KV head and its delay of scores; the KV head of every entry, and of every query."""
        starts: dict[int, tuple[int, int]] = {}
        owner: list[int] = []
        for group in self.groups:
            for head in group.heads:
                starts[head] = len(owner), group.config.score_delay
                owner += [head] * group.config.capacity
        small = torch.uint8 if len(starts) <= 2**8 else torch.int32
        self._owner = upload(torch.tensor(owner, dtype=small), device)
        by_head = zip(*(starts[head] for head in sorted(starts)), strict=True)
        self._first, self._delay = upload(torch.tensor(list(by_head)), device)
        queries = torch.arange(num_heads, device=device) // (num_heads // len(starts))
        self._of_query = queries.to(small)[:, None]

    def tensors(self) -> list[torch.Tensor]:
        """All that is there besides the layer's entries."""
        own = (self.bias, self._at, self._position_ahead, self._scored_until)
        heads = (self._owner, self._of_query, self._first, self._delay) if self.is_split else ()
        return [tensor for tensor in (*own, *heads) if tensor is not None]

    def sync(self, plans: Sequence[Plan], mass_biases: Sequence[torch.Tensor | None]) -> None:
        """Take up what was written since, and prepare for steps from the next token on.

        Parameters
        ----------
        plans : sequence of Plan
            Of the next token, a step, for every group of heads.
        mass_biases : sequence of torch.Tensor, optional
            (batch, kv_heads, capacity) of every group, on the logits of its entries.
        """
        self._put_next(plans)
        first_at, index = self._at[:, :1], torch.arange(self.bias.shape[1], device=self._at.device)
        owner = self._owner.long() if self.is_split else None
        at = self._at if owner is None else self._at[:, owner]  # (rows, 1 or entries), of an entry's head
        is_new = index >= at  # (rows, entries)
        mass = self._by_entry(mass_biases)
        bias = torch.zeros_like(self.bias) if mass is None else mass
        self.bias.copy_(bias.masked_fill(is_new, HIDDEN))
        for tensor in (self.entries.scores, self.entries.log_mass):
            if tensor is not None:
                tensor.masked_fill_(is_new, 0.0)
        position = _per_row(plans[0].positions, first_at)
        if self.entries.position is not None:
            later = (position + index - at).to(self.entries.position.dtype)
            self.entries.position.copy_(torch.where(is_new, later, self.entries.position))
        self._position_ahead.copy_(position - first_at)
        if self._scored_until is not None:
            delay = self.groups[0].config.score_delay if owner is None else self._delay[owner]
            self._scored_until.copy_(index - at + first_at + delay)
        self.is_current = True

    def _put_next(self, plans: Sequence[Plan]) -> None:
        if not self.is_split:
            self._at.copy_(_per_row(plans[0].cache_positions, self._at))
            return
        batch = self._at.shape[0]
        at = {
            head: plan.cache_positions.expand(batch, 1)
            for group, plan in zip(self.groups, plans, strict=True)
            for head in group.heads
        }
        self._at.copy_(torch.cat([at[head] for head in sorted(at)], dim=1) + self._first)

    def _by_entry(self, tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        """(batch, kv_heads, capacity) of every group as one (rows, entries); zero where a group has none."""
        if all(tensor is None for tensor in tensors):
            return None
        if not self.is_split:
            return tensors[0].flatten(0, 1)  # type: ignore[union-attr]
        batch = self.bias.shape[0]
        parts = [
            self.bias.new_zeros(batch, group.stop - group.start) if tensor is None else tensor.flatten(1)
            for group, tensor in zip(self.groups, tensors, strict=True)
        ]
        return torch.cat(parts, dim=1)

    def read(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        squared: bool = False,
        window: int | None = None,
        attend: Callable | None = None,
    ) -> torch.Tensor:
        """Attention of a token to the entries and itself; it is written to them, and its attention to their scores.

        Parameters
        ----------
        query : torch.Tensor
            (batch, heads, 1, head_dim).
        key, value : torch.Tensor
            (batch, kv_heads, 1, head_dim).
        squared : bool
            Score entries by the square of the attention they receive.
        window : int, optional
            Tokens that the query sees.
        attend : callable, optional
            A kernel, as in ``lococo.register_attention``, in the place of torch's own operations.

        Returns
        -------
        torch.Tensor
            (batch, heads, 1, head_dim).
        """
        shape = (self._at.shape[0], -1, query.shape[-1])
        self._write(key.reshape(shape), value.reshape(shape))
        if self.entries.queries is not None:
            self._write_queries(self.entries.queries, query, key.shape[1])
        self.bias.scatter_(1, self._at, 0.0)
        bias, grouped = self._seen(window), query.reshape(shape)
        result = None
        if self.codec is not None and attend is None and triton_takes(query):
            result = self._attend_codes(self.codec, grouped, bias, scale, squared)
        output, received = self._attend(grouped, bias, scale, squared, attend) if result is None else result
        if self.entries.scores is not None and received is not None:
            self._score(self.entries.scores, received)
        self._at += 1
        return output.reshape(query.shape)

    def _attend(
        self, query: torch.Tensor, bias: torch.Tensor, scale: float, squared: bool, attend: Callable | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(rows, queries, head_dim) of as many queries, and the attention received; by torch or a user's kernel."""
        keys, values = self._numbers()
        bias = self._by_query(bias)
        is_exact = query.dtype in (torch.float32, torch.float64) and attend is None
        is_scored = self.entries.scores is not None
        if is_exact or is_scored:
            logits = torch.baddbmm(bias, query, keys.transpose(1, 2), alpha=scale)
            probabilities = logits.softmax(dim=-1, dtype=self._wide)  # (rows, queries, entries)
        if is_exact:
            output = torch.bmm(probabilities, values)
        elif attend is not None:
            output = self._attend_by(attend, query, keys, values, bias, scale)
        else:  # logits in half precision are good enough for scores alone
            rows = (query[:, None], keys[:, None], values[:, None])
            output = F.scaled_dot_product_attention(*rows, attn_mask=bias[:, None], scale=scale)
        if not is_scored:
            return output, None
        return output, (probabilities.square_() if squared else probabilities).sum(dim=1)

    def _attend_codes(
        self, codec: Codec, query: torch.Tensor, bias: torch.Tensor, scale: float, squared: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """The same by a kernel that reads codes; None where it cannot."""
        entries, first = self.entries, self._first if self.is_split else None
        how = (entries.scores is not None, squared)
        groups = query.shape[1] // self._at.shape[1]
        trial = DecodeTrial(query.device, query.dtype, query.shape[-1], codec, groups, self.is_split, *how)
        keys_range = entries.keys_range if entries.rotated is None else entries.rotated_range
        held = (entries.rotated_keys, keys_range, entries.values, entries.values_range)
        return TRITON.run(trial, query, *held, codec, bias, self._at, scale, first, *how)

    def _write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put (rows, heads of a row, head_dim) of a token into its entries."""
        name = "keys" if self.entries.rotated is None else "rotated"
        new = {name: key, "values": value}
        if self.codec is not None:
            for each, (codes, span) in zip(list(new), self.codec.coded(key, value), strict=True):
                new[each] = codes
                if span is not None:
                    new[f"{each}_range"] = span
        for each, tensor in new.items():
            held = getattr(self.entries, each)
            held.scatter_(1, self._at[..., None].expand(-1, -1, held.shape[-1]), tensor.to(held.dtype))

    def _numbers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, entries, head_dim) keys that attention reads, and values."""
        entries = self.entries
        if self.codec is None:
            return entries.rotated_keys, entries.values
        read = Entries(entries.rotated_keys, entries.values)
        read.keys_range = entries.keys_range if entries.rotated is None else entries.rotated_range
        read.values_range = entries.values_range
        read = self.codec.decoded(read)
        return read.keys, read.values

    def _attend_by(
        self,
        attend: Callable,
        grouped: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        bias: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """(rows, queries, head_dim) of a kernel, for which every query of its own bias is a KV head."""
        if self.is_split:
            query, heads = grouped[:, :, None], bias.shape[1]
            key, value = (each[:, None].expand(-1, heads, -1, -1) for each in (keys, values))
        else:
            query, key, value = grouped[:, :, None], keys[:, None], values[:, None]
        return attend(query, key, value, scale, LogitBias(bias=bias), 0.0, False)[0][:, :, 0].to(grouped.dtype)

    def _write_queries(self, queries: torch.Tensor, query: torch.Tensor, kv_heads: int) -> None:
        at = self._at[..., None].expand(-1, -1, queries.shape[-1])
        queries.scatter_(1, at, by_group(query, kv_heads).to(queries.dtype).reshape(at.shape))

    def _score(self, scores: torch.Tensor, received: torch.Tensor) -> None:
        if self._scored_until is None:
            scores += received
        else:
            scores.addcmul_(received, self._scored_until <= self._at[:, :1])

    def _by_query(self, bias: torch.Tensor) -> torch.Tensor:
        """(rows, 1 or heads, entries) of (rows, entries): hidden what is not of a query's head."""
        if not self.is_split:
            return bias[:, None]
        return torch.where(self._owner == self._of_query, bias[:, None], HIDDEN)

    def _seen(self, window: int | None) -> torch.Tensor:
        """(rows, entries), the bias with what a window does not reach hidden."""
        if window is None:
            return self.bias
        position = cast(torch.Tensor, self.entries.position)  # every layer with a window has them
        oldest = self._at[:, :1] + self._position_ahead - window
        return self.bias.masked_fill(position <= oldest, HIDDEN)


def _per_row(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(1 or batch, 1) of each text as (rows, 1), however many rows a text has."""
    return tensor.expand(-1, rows.shape[0] // tensor.shape[0]).reshape(-1, 1)
