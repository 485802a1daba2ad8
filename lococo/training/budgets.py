"""How many slots each KV head gets: many where evicted tokens are missed, few where only neighbours are read."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import torch

from lococo.training.evictions import LOG_SCALES

STEPS_BETWEEN = 3  # levels put between two measured ones
STEEPEST = 4  # power of the slots by which an error may fall between them
ALTERNATIONS = 10  # between slots and the weight of centroids, at most
SIMILAR = 1.5  # largest ratio of the slots of two heads of a layer that get as many


def slot_levels(num_slots: int) -> tuple[int, ...]:
    """Numbers of slots a head may get, from a sixteenth of the average to sixteen times it, by half octaves."""
    return tuple(sorted({max(1, round(num_slots * 2 ** (half / 2))) for half in range(-8, 9)}))


def allocate_with_scales(
    errors: torch.Tensor, levels: Sequence[int], num_slots: int
) -> tuple[tuple[tuple[int, ...] | None, ...], tuple[float, ...]]:
    """Slots of every KV head, and how much the centroids of every layer weigh, found in turn until neither changes.

    Heads of a layer whose slots are similar get as many: what that costs is far less than the time it saves.

    Parameters
    ----------
    errors : torch.Tensor
        (scales, levels, layers, kv_heads), from ``eviction_errors``.

    Returns
    -------
    tuple
        As of ``allocate``, with None for layers whose errors are NaN, which keep their window; and one of
        ``LOG_SCALES`` for every layer.
    """
    is_kept = errors.isnan().any(dim=(0, 1, 3)).tolist()
    found = zip(*_allocate_with_scales(errors[:, :, [not kept for kept in is_kept]], levels, num_slots), strict=True)
    by_layer = [(None, LOG_SCALES[0]) if kept else next(found) for kept in is_kept]
    return tuple(slots for slots, _ in by_layer), tuple(scale for _, scale in by_layer)


def _allocate_with_scales(
    errors: torch.Tensor, levels: Sequence[int], num_slots: int
) -> tuple[tuple[tuple[int, ...], ...], tuple[float, ...]]:
    layers, kv_heads = errors.shape[2:]
    layer, head = torch.arange(layers)[:, None], torch.arange(kv_heads)
    measured = torch.tensor(levels, dtype=torch.float64).log()
    of_scales = errors.amin(dim=0)  # (levels, layers, kv_heads): at first every head may have a scale of its own
    scales = torch.full((layers,), -1)
    for _ in range(ALTERNATIONS):
        slots = allocate(of_scales, levels, num_slots)
        closest = (torch.tensor(slots).log()[..., None] - measured).abs().argmin(dim=-1)  # (layers, kv_heads)
        before, scales = scales, errors[:, closest, layer, head].sum(dim=-1).argmin(dim=0)
        if torch.equal(before, scales):
            break
        of_scales = errors[scales, :, torch.arange(layers)].transpose(0, 1)
    slots = tuple(map(_evened, slots))
    return slots, tuple(LOG_SCALES[index] for index in scales.tolist())


def allocate(errors: torch.Tensor, levels: Sequence[int], num_slots: int) -> tuple[tuple[int, ...], ...]:
    """Slots of every KV head, ``num_slots`` on average at most, with the smallest summed error.

    Between the measured levels an error is taken to fall as a power of the slots. Slots go, step by step, to the head
    whose error falls most for each of them. Steps lead along the lower convex hull of a head's errors, so that the
    outcome is optimal but for the last, partial step.

    Parameters
    ----------
    errors : torch.Tensor
        (levels, layers, kv_heads).
    levels : sequence of int
        Rising.

    Returns
    -------
    tuple of tuples of int
        For ``LoCoCoConfig(slots_per_head=...)``.

    Raises
    ------
    ValueError
        If even the lowest level is more than ``num_slots``.
    """
    if levels[0] > num_slots:
        raise ValueError(f"levels must begin at num_slots={num_slots} or below, got {levels[0]}")
    layers, kv_heads = errors.shape[1:]
    levels, errors = _refined(levels, errors)
    by_head = errors.flatten(1).T.tolist()
    chosen = [0] * len(by_head)  # index of each head's level
    left = (num_slots - levels[0]) * len(by_head)
    queue = [step for head in range(len(by_head)) for step in _best_step(by_head[head], levels, 0, head, left)]
    heapq.heapify(queue)
    while queue:
        _, level, head = heapq.heappop(queue)
        cost = levels[level] - levels[chosen[head]]
        if cost <= left:
            left -= cost
            chosen[head] = level
        for step in _best_step(by_head[head], levels, chosen[head], head, left):
            heapq.heappush(queue, step)
    slots = [levels[level] for level in chosen]
    return tuple(tuple(slots[layer * kv_heads : (layer + 1) * kv_heads]) for layer in range(layers))


def _evened(slots: Sequence[int]) -> tuple[int, ...]:
    """Slots of heads of a layer, similar numbers made the same: heads that have as many are read at once."""
    even = list(slots)
    rising = sorted(range(len(slots)), key=lambda head: slots[head])
    while rising:
        alike = [head for head in rising if slots[head] <= SIMILAR * slots[rising[0]]]
        for head in alike:
            even[head] = sum(slots[other] for other in alike) // len(alike)
        rising = rising[len(alike) :]
    return tuple(even)


def _refined(levels: Sequence[int], errors: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    """Levels with STEPS_BETWEEN more between two measured ones, and the errors there."""
    # More slots are never worse but for noise; an error of 0 has no logarithm.
    logs = errors.cummin(dim=0).values.clamp_min(1e-30).log()
    fine: dict[int, torch.Tensor] = {}
    for index in range(len(levels) - 1):
        low, high = levels[index], levels[index + 1]
        # Where the higher level loses nothing (a window, a short text) a power tells nothing of the way there.
        reached = torch.maximum(logs[index + 1], logs[index] - STEEPEST * math.log(high / low))
        for step in range(STEPS_BETWEEN + 1):
            slots = round(low * (high / low) ** (step / (STEPS_BETWEEN + 1)))
            fraction = math.log(slots / low) / math.log(high / low)
            if slots < high:
                fine.setdefault(slots, torch.lerp(logs[index], reached, fraction).exp())
    fine[levels[-1]] = logs[-1].exp()
    return list(fine), torch.stack(list(fine.values()))


def _best_step(
    errors: Sequence[float], levels: Sequence[int], level: int, head: int, left: int
) -> list[tuple[float, int, int]]:
    """The step up from a level with the steepest fall that can be paid, as (slope, level, head): one or none."""
    steps = [
        ((errors[higher] - errors[level]) / (levels[higher] - levels[level]), higher, head)
        for higher in range(level + 1, len(levels))
        if levels[higher] - levels[level] <= left
    ]
    return [min(steps)] if steps else []
