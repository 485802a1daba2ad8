"""Why a token was kept or dropped: what the compression that decided about it saw of it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from lococo.compression.base import Compressor
from lococo.compression.entries import Choice, Entries
from lococo.compression.select import Budget, rank, score_parts
from lococo.config import LoCoCoConfig

# Tokens of the open block wait; the dropped are in a blend, or gone.
OUTCOMES = ("open", "sink", "heavy", "recent", "fused", "dropped")
OPEN, SINK, HEAVY, RECENT, FUSED, DROPPED = range(len(OUTCOMES))


class Compression(NamedTuple):
    """What a compression did with the entries of a KV head.

    Attributes
    ----------
    block, seen : int
        The block that ended, from 1 for the first, and the tokens read until then.
    candidates : int
        Entries that were ranked: those that are no sinks, no recents, and not in centroids already.
    kept : int
        How many of them, the first by rank, got a slot.
    """

    block: int
    seen: int
    candidates: int
    kept: int


@dataclasses.dataclass(frozen=True)
class Decisions:
    """The last compression that decided about each token of a KV head, while it was an entry of its own.

    Attributes
    ----------
    compressions : list of Compression
        All of the head.
    at : torch.Tensor
        (tokens,) number of the compression in that list; -1 in the open block.
    outcome : torch.Tensor
        (tokens,) places in ``OUTCOMES``. A token that is ``fused`` is what a fused slot began with.
    rank : torch.Tensor
        (tokens,) from 1 for the best candidate; 0 for what was no candidate.
    score : torch.Tensor
        (tokens,) by which it was ranked; NaN where nothing is chosen by score, minus infinity out of a window's sight.
    parts : dict of str to torch.Tensor
        (tokens,) each: what the score is made of, see ``Score.parts``.
    slot : torch.Tensor
        (tokens,) the slot it went to, of several the one that took most of it; -1: none.
    weight : torch.Tensor
        (tokens,) its part of that slot.
    """

    compressions: list[Compression]
    at: torch.Tensor
    outcome: torch.Tensor
    rank: torch.Tensor
    score: torch.Tensor
    parts: dict[str, torch.Tensor]
    slot: torch.Tensor
    weight: torch.Tensor


class DecisionLog:
    """Notes what the compressions of a group of KV heads decide about tokens, for one row without padding.

    Parameters
    ----------
    config : LoCoCoConfig
        Of the group.
    window : int, optional
        Tokens a query of the layer sees.
    """

    def __init__(self, config: LoCoCoConfig, window: int | None) -> None:
        self.config, self.window = config, window
        self.compressions: list[Compression] = []
        self._tokens: torch.Tensor | None = None  # (kv_heads, slots), the token that a slot is a copy of, or -1
        self._seen = 0
        self._columns: dict[str, torch.Tensor] = {}  # (kv_heads, tokens so far)

    def note(self, before: Entries, seen: int, head: Compressor | None, choice: Choice, mix: torch.Tensor) -> None:
        """Note a compression that is about to be made.

        Parameters
        ----------
        before : Entries
            (1, kv_heads, entries, ...).
        mix : torch.Tensor
            (kv_heads, slots, entries), see ``mixing``.
        """
        tokens = self._tokens_of(seen, mix)
        weight, slot = mix.max(dim=1)
        found = self._ranked(before, seen, head) | {
            "at": torch.full_like(tokens, len(self.compressions) - 1),
            "outcome": self._outcomes(len(before), choice),
            "slot": slot.masked_fill(weight == 0, -1),
            "weight": weight,
        }
        for name, values in found.items():
            self._columns[name] = _put(self._columns.get(name), tokens, values, seen)
        anchors = choice.anchors[0]
        is_copy = mix.gather(2, anchors[..., None])[..., 0] == 1
        self._tokens, self._seen = tokens.gather(1, anchors).masked_fill(~is_copy, -1), seen

    def decisions(self, place: int, num_tokens: int) -> Decisions:
        """Of one of the group's heads, after so many tokens."""
        columns = {name: values[place].cpu() for name, values in self._columns.items()}
        late = num_tokens - self._seen
        nothing = {"at": -1, "outcome": OPEN, "rank": 0, "slot": -1}

        def whole(name: str) -> torch.Tensor:
            ends = torch.full((late,), nothing.get(name, float("nan")))
            return torch.cat([columns.pop(name), ends]) if self.compressions else ends

        common = {name: whole(name) for name in ("at", "outcome", "rank", "score", "slot", "weight")}
        return Decisions(self.compressions, **common, parts={name: whole(name) for name in list(columns)})

    def _tokens_of(self, seen: int, like: torch.Tensor) -> torch.Tensor:
        """(kv_heads, entries) the token that an entry is, or -1 for a blend."""
        new = torch.arange(self._seen, seen, device=like.device).expand(like.shape[0], -1)
        return new if self._tokens is None else torch.cat([self._tokens, new], dim=1)

    def _outcomes(self, num_entries: int, choice: Choice) -> torch.Tensor:
        """(kv_heads, entries)."""
        budget, anchors = Budget.of(self.config, self.window), choice.anchors[0]
        outcome = torch.full((anchors.shape[0], num_entries), DROPPED, device=anchors.device)
        outcome = outcome.scatter(1, anchors, HEAVY).scatter(1, anchors.gather(1, choice.fused[0]), FUSED)
        outcome[:, : budget.sinks] = SINK
        outcome[:, num_entries - budget.recent :] = RECENT
        return outcome

    def _ranked(self, before: Entries, seen: int, head: Compressor | None) -> dict[str, torch.Tensor]:
        """(kv_heads, entries) rank, score and its parts."""
        budget, is_running = Budget.of(self.config, self.window), head is not None and head.is_running
        first = budget.sinks + (budget.fused if is_running else 0)
        last = len(before) - budget.recent
        kept = budget.heavy + (0 if is_running else budget.fused)
        block = -(-seen // self.config.block_size)
        self.compressions.append(Compression(block, seen, last - first, kept))
        score = rank(before, seen, self.config, self.window)
        if score is None:
            score = before.values.new_full(before.values.shape[:3], float("nan"))
            order = torch.arange(last - first, device=score.device).expand(score.shape[1], -1)
        else:
            order = score[0, :, first:last].sort(dim=-1, descending=True, stable=True).indices
        ranks = order.argsort(dim=-1) + 1
        parts = score_parts(before, seen, self.config, self.window)
        return {
            "rank": torch.nn.functional.pad(ranks, (first, budget.recent)),
            "score": score[0],
            **{name: part[0] for name, part in parts.items()},
        }


def _put(held: torch.Tensor | None, tokens: torch.Tensor, values: torch.Tensor, seen: int) -> torch.Tensor:
    """(kv_heads, seen) with (kv_heads, entries) values of tokens in their places; blends, which are -1, have none."""
    whole = values.new_zeros(values.shape[0], seen + 1)  # the last takes what blends have
    if held is not None:
        whole[:, : held.shape[1]] = held
    return whole.scatter(1, tokens.masked_fill(tokens < 0, seen), values)[:, :seen]
