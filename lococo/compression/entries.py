"""What a layer remembers, and which of it is chosen for the slots."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


@dataclasses.dataclass
class Entries:
    """What a layer remembers of the text, in time order.

    Attributes
    ----------
    keys, values : torch.Tensor
        (batch, kv_heads, entries, head_dim).
    scores : torch.Tensor, optional
        (batch, kv_heads, entries), attention received so far, summed over queries and the query heads of a group.
    position : torch.Tensor, optional
        (batch, kv_heads, entries), place in the text, in tokens; a blend's is the mean of its tokens'.
    log_mass : torch.Tensor, optional
        (batch, kv_heads, entries), log of the number of tokens an entry stands for.
    rotated : torch.Tensor, optional
        (batch, kv_heads, entries, head_dim), keys at their place in the cache, with ``positions="slot"``. ``keys`` are
        un-rotated then, so that a key which stays for thousands of segments is rounded once, not at every move.
    queries : torch.Tensor, optional
        (batch, kv_heads, entries, groups * head_dim), rotated queries of the tokens, those of a KV head's group side
        by side, for compressors that ask for them. A blend has those of the entry it begins with.
    features : torch.Tensor, optional
        (batch, kv_heads, entries, num_features) in float16, what a learned score made of the tokens when they were
        read. A blend has those of the entry it begins with.
    keys_range, values_range, rotated_range : torch.Tensor, optional
        (batch, kv_heads, entries, 2 * groups) in float16, where keys or values are held as codes: what codes mean, see
        ``lococo.compression.codes``.
    """

    keys: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor | None = None
    position: torch.Tensor | None = None
    log_mass: torch.Tensor | None = None
    rotated: torch.Tensor | None = None
    queries: torch.Tensor | None = None
    features: torch.Tensor | None = None
    keys_range: torch.Tensor | None = None
    values_range: torch.Tensor | None = None
    rotated_range: torch.Tensor | None = None

    @property
    def rotated_keys(self) -> torch.Tensor:
        """The keys that attention reads."""
        return self.keys if self.rotated is None else self.rotated

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Entries:
        """The same function on every tensor that is there."""
        return self.combine(self, lambda tensor, _: function(tensor))

    def combine(self, other: Entries, function: Callable[[torch.Tensor, Any], torch.Tensor]) -> Entries:
        """A function of two entries' tensors, field by field, where both have the field; else what this one has."""
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return Entries(*(mine if mine is None or theirs is None else function(mine, theirs) for mine, theirs in pairs))  # type: ignore

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The fields in order, None where a configuration has no use for one."""
        return tuple(getattr(self, name) for name in ENTRY_FIELDS)

    def __len__(self) -> int:
        return self.keys.shape[2]


ENTRY_FIELDS = tuple(field.name for field in dataclasses.fields(Entries))


class Choice(NamedTuple):
    """Entries chosen for the slots, in time order."""

    anchors: torch.Tensor  # (batch, kv_heads, num_slots), entry each slot copies or starts from
    fused: torch.Tensor  # (batch, kv_heads, num_fused), slots that are blended
    evicted: torch.Tensor | None = None  # (batch, kv_heads, N - num_slots), entries that no slot begins with

    def blendable(self, num_entries: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What fused slots may be made of.

        Returns
        -------
        tuple
            (batch, kv_heads, num_fused), the entry each fused slot starts from; (batch, kv_heads, entries), True where
            an entry may be blended: no other slot holds a copy of it.
        """
        anchors = self.anchors.gather(-1, self.fused)
        rest = torch.ones(*self.anchors.shape[:2], num_entries, dtype=torch.bool, device=anchors.device)
        return anchors, rest.scatter(-1, self.anchors, False).scatter(-1, anchors, True)


def by_group(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(batch, heads, tokens, head_dim) queries as (batch, kv_heads, tokens, groups * head_dim)."""
    return query.unflatten(1, (kv_heads, -1)).transpose(2, 3).flatten(3)
