"""Which entries are kept and which are blended: entries in, M slots out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lococo.backends import triton_takes
from lococo.config import LoCoCoConfig
from lococo.fusion import ROW_SUM_EPS, FusionHead
from lococo.scores import get_score
from lococo.trials import TRITON, BlendTrial

SMALLEST_WEIGHT = 1e-9


@dataclasses.dataclass
class Entries:
    """What a layer remembers of the text, in time order.

    Attributes
    ----------
    keys, values : torch.Tensor
        (batch, kv_heads, entries, head_dim).
    scores : torch.Tensor, optional
        (batch, kv_heads, entries), attention received so far, summed over queries and the query heads of a group.
    born : torch.Tensor, optional
        (batch, kv_heads, entries), place in the text, in tokens; a blend's is the mean of its tokens'.
    log_mass : torch.Tensor, optional
        (batch, kv_heads, entries), log of the number of tokens an entry stands for.
    rotated : torch.Tensor, optional
        (batch, kv_heads, entries, head_dim), keys at their place in the cache, with ``positions="slot"``. ``keys`` are
        un-rotated then, so that a key which stays for thousands of segments is rounded once, not at every move.
    """

    keys: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor | None = None
    born: torch.Tensor | None = None
    log_mass: torch.Tensor | None = None
    rotated: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Entries:
        """The same function on every tensor that is there."""
        return self.combine(self, lambda tensor, _: function(tensor))

    def combine(self, other: Entries, function: Callable[[torch.Tensor, Any], torch.Tensor]) -> Entries:
        """A function of two entries' tensors, field by field, where this one has the field."""
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return Entries(*(mine if mine is None else function(mine, theirs) for mine, theirs in pairs))  # type: ignore

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The fields in order, None where a configuration has no use for one."""
        return self.keys, self.values, self.scores, self.born, self.log_mass, self.rotated

    def __len__(self) -> int:
        return self.keys.shape[2]


class Budget(NamedTuple):
    """How a layer's slots are shared out. See ``LoCoCoConfig``."""

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
        return self.heavy > 0 or (self.fused > 0 and config.residual != "none")


class Choice(NamedTuple):
    """Entries chosen for the slots, in time order."""

    anchors: torch.Tensor  # (batch, kv_heads, num_slots), entry each slot copies or starts from
    fused: torch.Tensor  # (batch, kv_heads, num_fused), slots that are blended


def rank(
    entries: Entries, now: int | torch.Tensor, config: LoCoCoConfig, window: int | None = None
) -> torch.Tensor | None:
    """Score by which heavy hitters are chosen, higher is better; None if nothing is chosen by score.

    Parameters
    ----------
    now : int or torch.Tensor
        Tokens read so far; a tensor of shape (batch, 1, 1) where rows differ.
    window : int, optional
        Tokens a query of this layer sees; entries out of sight of the next query rank last.
    """
    if not Budget.of(config, window).is_ranked(config):
        return None
    age: Any = None if entries.born is None else now - entries.born
    ranking = get_score(config.score).rank(entries, age, config)
    return ranking if window is None else ranking.masked_fill(age >= window, float("-inf"))


def choose(ranking: torch.Tensor | None, num_entries: int, budget: Budget, like: torch.Tensor) -> Choice:
    """Sinks first, recents last, between them the best of the others by rank (ties: the earlier one).

    Parameters
    ----------
    ranking : torch.Tensor, optional
        (batch, kv_heads, entries). None: the earliest entries after the sinks.
    like : torch.Tensor
        (batch, kv_heads, ...), for the device and the leading sizes.
    """
    sinks, heavy, recent, fused = budget
    batch, kv_heads = like.shape[:2]
    index = torch.arange(num_entries, device=like.device).expand(batch, kv_heads, num_entries)
    if ranking is None:
        best = index[..., : heavy + fused]
    else:
        best = ranking[..., sinks : num_entries - recent].sort(dim=-1, descending=True, stable=True).indices
    in_time, place_by_rank = best[..., : heavy + fused].sort(dim=-1)
    anchors = torch.cat([index[..., :sinks], sinks + in_time, index[..., num_entries - recent :]], dim=-1)
    is_fused = (place_by_rank >= heavy).to(torch.uint8)
    fused_slots = sinks + is_fused.sort(dim=-1, descending=True, stable=True).indices[..., :fused]
    return Choice(anchors, fused_slots)


def compress(
    entries: Entries,
    now: int | torch.Tensor,
    config: LoCoCoConfig,
    head: FusionHead | None,
    window: int | None = None,
) -> Entries:
    """M slots from more than M entries (Algorithm 2's compressor).

    Sinks, heavy hitters and recents are copies; every fused slot is a blend of the entries nobody copied, with the
    same weights for keys, values, scores and places.

    Parameters
    ----------
    entries : Entries
        More than ``num_slots`` of them.
    now : int or torch.Tensor
        Tokens read so far; (batch, 1, 1) where rows differ.
    head : FusionHead, optional
        None where nothing is fused.
    window : int, optional
        Size of the layer's sliding window.

    Returns
    -------
    Entries
        ``num_slots`` entries in time order.
    """
    budget = Budget.of(config, window)
    choice = choose(rank(entries, now, config, window), len(entries), budget, entries.keys)
    slots = entries.map(lambda tensor: _gather(tensor, choice.anchors))
    if budget.fused == 0 or head is None or head.is_closed:
        return slots
    blend = _blend(entries, choice, head)
    return slots.combine(blend, functools.partial(_scatter, choice.fused))


def mixing(
    entries: Entries,
    now: int | torch.Tensor,
    config: LoCoCoConfig,
    head: FusionHead | None,
    window: int | None = None,
) -> tuple[Choice, torch.Tensor]:
    """The compression of ``compress`` as one matrix: (batch, kv_heads, num_slots, entries), each row sums to 1."""
    budget = Budget.of(config, window)
    choice = choose(rank(entries, now, config, window), len(entries), budget, entries.keys)
    weights = torch.zeros(*choice.anchors.shape, len(entries), device=entries.keys.device)
    weights = weights.scatter(-1, choice.anchors[..., None], 1.0)
    if budget.fused == 0 or head is None or head.is_closed:
        return choice, weights
    blend = head(entries.keys, entries.values, *_blendable(entries, choice))
    return choice, _scatter(choice.fused, weights, blend)


def _blendable(entries: Entries, choice: Choice) -> tuple[torch.Tensor, torch.Tensor]:
    """The entry each fused slot starts from, and which entries may be blended."""
    anchors = choice.anchors.gather(-1, choice.fused)
    rest = torch.ones(entries.keys.shape[:3], dtype=torch.bool, device=entries.keys.device)
    return anchors, rest.scatter(-1, choice.anchors, False).scatter(-1, anchors, True)


def _blend(entries: Entries, choice: Choice, head: FusionHead) -> Entries:
    fused_anchors, rest = _blendable(entries, choice)
    if head.normalization == "sum" and not torch.is_grad_enabled() and triton_takes(entries.keys):
        blend = blend_in_triton(entries, fused_anchors, rest, head)
        if blend is not None:
            return blend
    weights = head(entries.keys, entries.values, fused_anchors, rest)
    mix = weights.to(entries.keys.dtype)
    fixed = weights.detach()
    return Entries(
        keys=mix @ entries.keys,
        values=mix @ entries.values,
        scores=_average(fixed, entries.scores),
        born=_average(fixed, entries.born),
        log_mass=None if entries.log_mass is None else log_mass(weights, entries.log_mass),
    )


def blend_in_triton(entries: Entries, anchors: torch.Tensor, rest: torch.Tensor, head: FusionHead) -> Entries | None:
    """Blends of a head that divides its weights by their sum, in one kernel; None where Triton does not run.

    Parameters
    ----------
    anchors, rest
        As in ``FusionHead.forward``.
    """
    keys, carried = entries.keys, entries.log_mass
    logits, gates = head.logits_and_gates(keys, entries.values, anchors.shape[-1])
    averaged = [tensor for tensor in (entries.scores, entries.born) if tensor is not None]
    trial = BlendTrial(
        *(keys.device, keys.dtype, keys.shape[-1], logits.dtype, len(averaged)),
        has_mass=carried is not None,
        has_gates=gates is not None,
    )
    blend = TRITON.run(
        trial,
        *(keys, entries.values, averaged, carried, logits, gates, anchors, rest, ROW_SUM_EPS, SMALLEST_WEIGHT),
    )
    if blend is None:
        return None
    keys, values, averages = blend
    log_mass = None if carried is None else averages.pop()
    born = None if entries.born is None else averages.pop()
    return Entries(keys, values, averages.pop() if averages else None, born, log_mass)


def log_mass(weights: torch.Tensor, carried: torch.Tensor) -> torch.Tensor:
    """Log of the number of tokens a blend stands for: entropy of its weights plus the log-mass it inherits.

    A copy keeps its mass; the even blend of n tokens has mass n.

    Parameters
    ----------
    weights : torch.Tensor
        (batch, kv_heads, num_fused, entries), rows sum to 1.
    carried : torch.Tensor
        (batch, kv_heads, entries).
    """
    # The entropy's slope at 0 is infinite, so weights that are (almost) nothing count as nothing.
    entropy = torch.special.entr(torch.where(weights > SMALLEST_WEIGHT, weights, 1.0)).sum(dim=-1)
    return entropy + _average(weights, carried)


def _average(weights: torch.Tensor, values: torch.Tensor | None) -> torch.Tensor | None:
    return None if values is None else (weights @ values[..., None]).squeeze(-1)


def _gather(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    if tensor.dim() == 4:
        index = index[..., None].expand(*index.shape, tensor.shape[-1])
    return tensor.gather(2, index)


def _scatter(places: torch.Tensor, slots: torch.Tensor, blend: torch.Tensor) -> torch.Tensor:
    index = places if slots.dim() == 3 else places[..., None].expand(*places.shape, slots.shape[-1])
    return slots.scatter(2, index, blend.to(slots.dtype))
