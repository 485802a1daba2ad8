"""Which entries are kept and which are blended: entries in, M slots out."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, cast

import torch

from lococo.compression.base import Compressor
from lococo.compression.codes import Codec
from lococo.compression.entries import Choice, Entries
from lococo.config import LoCoCoConfig
from lococo.registry import SCORES


class Budget(NamedTuple):
    """Slots of each kind, as in ``LoCoCoConfig``; together ``num_slots``."""

    sinks: int
    heavy: int
    recent: int
    fused: int

    @classmethod
    def of(cls, config: LoCoCoConfig, window: int | None = None) -> Budget:
        """The configured budget; in a sliding-window layer all but the recents go to entries the window still sees."""
        sinks, heavy, recent, fused = config.num_sinks, config.num_heavy, config.num_recent, config.num_fused
        if window is not None:
            sinks, heavy, fused = 0, config.num_slots - recent, 0  # type: ignore[operator]
        return cls(sinks, heavy, recent, fused)  # type: ignore[arg-type]

    def is_ranked(self, config: LoCoCoConfig) -> bool:
        """Whether any slot is chosen by score."""
        return self.heavy > 0 or (self.fused > 0 and config.fuses_by_rank)


def rank(
    entries: Entries, seen: int | torch.Tensor, config: LoCoCoConfig, window: int | None = None
) -> torch.Tensor | None:
    """Score by which heavy hitters are chosen, higher is better; None if nothing is chosen by score.

    Parameters
    ----------
    seen : int or torch.Tensor
        Tokens read so far; a tensor of shape (batch, 1, 1) where rows differ.
    window : int, optional
        Tokens a query of this layer sees; entries out of sight of the next query rank last.
    """
    if not Budget.of(config, window).is_ranked(config):
        return None
    age = _age(entries, seen)
    ranking = SCORES[config.score]().rank(entries, age, config)
    return ranking if window is None else ranking.masked_fill(age >= window, float("-inf"))


def score_parts(
    entries: Entries, seen: int | torch.Tensor, config: LoCoCoConfig, window: int | None = None
) -> dict[str, torch.Tensor]:
    """What ``rank`` is made of, see ``Score.parts``; nothing if nothing is chosen by score."""
    if not Budget.of(config, window).is_ranked(config):
        return {}
    return SCORES[config.score]().parts(entries, _age(entries, seen), config)


def _age(entries: Entries, seen: int | torch.Tensor) -> Any:
    return None if entries.position is None else seen - entries.position


def choose(
    ranking: torch.Tensor | None, num_entries: int, budget: Budget, like: torch.Tensor, is_running: bool = False
) -> Choice:
    """Sinks first, recents last, between them the best of the others by rank (ties: the earlier one).

    Parameters
    ----------
    ranking : torch.Tensor, optional
        (batch, kv_heads, entries). None: the earliest entries after the sinks.
    like : torch.Tensor
        (batch, kv_heads, ...), for the device and the leading sizes.
    is_running : bool
        Whether the entries after the sinks are fused slots, whatever their rank.
    """
    sinks, heavy, recent, fused = budget
    batch, kv_heads = like.shape[:2]
    index = torch.arange(num_entries, device=like.device).expand(batch, kv_heads, num_entries)
    if is_running and fused:
        kept = choose(ranking, num_entries, Budget(sinks + fused, heavy, recent, 0), like)
        return kept._replace(fused=index[..., sinks : sinks + fused])
    if ranking is None:
        best = index[..., : num_entries - sinks - recent]
    else:
        best = ranking[..., sinks : num_entries - recent].sort(dim=-1, descending=True, stable=True).indices
    in_time, rank_in_time = best[..., : heavy + fused].sort(dim=-1)
    anchors = torch.cat([index[..., :sinks], sinks + in_time, index[..., num_entries - recent :]], dim=-1)
    is_fused = (rank_in_time >= heavy).to(torch.uint8)
    fused_slots = sinks + is_fused.sort(dim=-1, descending=True, stable=True).indices[..., :fused]
    return Choice(anchors, fused_slots, sinks + best[..., heavy + fused :])


def compress(
    entries: Entries,
    seen: int | torch.Tensor,
    config: LoCoCoConfig,
    head: Compressor | None,
    window: int | None = None,
    codec: Codec | None = None,
) -> Entries:
    """M slots from more than M entries (Algorithm 2's compressor).

    Sinks, heavy hitters and recents are copies; every fused slot is a blend of the entries nobody copied, with the
    same weights for keys, values, scores and positions.

    Parameters
    ----------
    entries : Entries
        More than ``num_slots`` of them.
    seen : int or torch.Tensor
        Tokens read so far; (batch, 1, 1) where rows differ.
    head : Compressor, optional
        None where nothing is fused.
    window : int, optional
        Size of the layer's sliding window.
    codec : Codec, optional
        Where keys and values are held as codes: blends are rounded to what they stand for.

    Returns
    -------
    Entries
        ``num_slots`` entries in time order.
    """
    budget, choice = _chosen(entries, seen, config, head, window)
    slots = entries.map(lambda tensor: _gather(tensor, choice.anchors))
    if budget.fused == 0 or head is None or head.is_closed:
        return slots
    blend = _running_blend(entries, choice, head) if head.is_running else head.blend(entries, choice)
    if codec is not None:
        blend = codec.blended(blend)
    return slots.combine(blend, functools.partial(_scatter, choice.fused))


def _running_blend(entries: Entries, choice: Choice, head: Compressor) -> Entries:
    """The fused slots, of what they were and of what is evicted, without the entries that other slots copy."""
    own = choice.anchors.gather(-1, choice.fused)
    sources = torch.cat([own, cast(torch.Tensor, choice.evicted)], dim=-1)
    first = torch.arange(own.shape[-1], device=own.device).expand_as(own)
    entries = dataclasses.replace(entries, features=None)  # of the entries that slots begin with, they stay
    return head.blend(entries.map(lambda tensor: _gather(tensor, sources)), Choice(first, first))


def mixing(
    entries: Entries,
    seen: int | torch.Tensor,
    config: LoCoCoConfig,
    head: Compressor | None,
    window: int | None = None,
) -> tuple[Choice, torch.Tensor]:
    """The compression of ``compress`` as one matrix: (batch, kv_heads, num_slots, entries), each row sums to 1."""
    budget, choice = _chosen(entries, seen, config, head, window)
    weights = torch.zeros(*choice.anchors.shape, len(entries), device=entries.keys.device)
    weights = weights.scatter(-1, choice.anchors[..., None], 1.0)
    if budget.fused == 0 or head is None or head.is_closed:
        return choice, weights
    return choice, _scatter(choice.fused, weights, head.weights(entries, choice))


def _chosen(entries, seen, config, head, window) -> tuple[Budget, Choice]:
    budget = Budget.of(config, window)
    is_running = head is not None and head.is_running
    return budget, choose(rank(entries, seen, config, window), len(entries), budget, entries.keys, is_running)


def _gather(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    if tensor.dim() == 4:
        index = index[..., None].expand(*index.shape, tensor.shape[-1])
    return tensor.gather(2, index)


def _scatter(index: torch.Tensor, slots: torch.Tensor, blend: torch.Tensor) -> torch.Tensor:
    if slots.dim() == 4:
        index = index[..., None].expand(*index.shape, slots.shape[-1])
    return slots.scatter(2, index, blend.to(slots.dtype))
