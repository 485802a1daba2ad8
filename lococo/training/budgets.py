"""How many slots each KV head gets: many where evicted tokens are missed, few where only neighbours are read."""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from lococo.config import LoCoCoConfig
from lococo.models import base_shape
from lococo.training.record import LayerRecord, compressed_output, fisher_error, record
from lococo.training.scores import ScoreNetworks

STACKED_LAYERS = 10
STEPS_BETWEEN = 3  # levels put between two measured ones
STEEPEST = 4  # power of the slots by which an error may fall between them

# What decides which tokens stay.
SELECTION_FIELDS = ("block_size", "num_sinks", "num_heavy", "num_recent", "num_fused", "residual", "score")

Measure = Callable[[Sequence, Callable[[], list]], list]


def slot_levels(num_slots: int) -> tuple[int, ...]:
    """Numbers of slots a head may get, a sixteenth of the average to eight times as many."""
    steps = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
    return tuple(sorted({max(1, round(num_slots * step)) for step in steps}))


def eviction_errors(
    model: PreTrainedModel,
    windows: torch.Tensor,
    config: LoCoCoConfig,
    levels: Sequence[int],
    measure: Measure,
    networks: ScoreNetworks | None = None,
) -> torch.Tensor:
    """What it costs the loss that one KV head at a time keeps only so many slots.

    For every text, layer and KV head the attention output with evicted tokens is compared with the full cache's. Its
    difference, projected on the gradient of the next-token loss, is squared and summed over tokens and query heads:
    the diagonal of the loss' (empirical) Fisher information along the error.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Not patched.
    windows : torch.Tensor
        (texts, tokens) token ids.
    config : LoCoCoConfig
        Shares of the slots; nothing is fused here, a fused slot is its anchor (with ``residual="none"``, which has no
        anchors, the earliest token).
    levels : sequence of int
        Numbers of slots to try.
    measure : callable
        ``Journal.measure`` of a journal for this model: a killed run goes on at the text where it stopped.
    networks : ScoreNetworks, optional
        Of a learned score. None: the score is that of new ones.

    Returns
    -------
    torch.Tensor
        (levels, layers, kv_heads) in float64, a mean over texts.
    """
    shape = base_shape(model)
    total = torch.zeros(len(levels), shape["num_layers"], shape["num_kv_heads"], dtype=torch.float64)
    for ids in tqdm(windows, desc="slots per head", unit="text", disable=None):
        records = functools.cache(functools.partial(record, model, ids[None].long(), gradients=True))
        for index, slots in enumerate(levels):
            head_config = config.with_slots(slots)
            key: tuple = ({name: getattr(head_config, name) for name in SELECTION_FIELDS}, ids.tolist())
            key = ("eviction_errors", *key, *([] if networks is None else [networks.digest()]))
            errors = measure(key, functools.partial(_errors, records, head_config, networks))
            total[index] += torch.tensor(errors, dtype=torch.float64)
    return total / len(windows)


def _errors(
    records: Callable[[], dict[int, LayerRecord]], config: LoCoCoConfig, networks: ScoreNetworks | None
) -> list[list[float]]:
    errors = []
    for stack in _stacks(records()):
        features = None
        if networks is not None:
            features = torch.cat([networks.features(index, entry.key, entry.value) for index, entry in stack.items()])
        errors += _stack_errors(list(stack.values()), config, features)
    return errors


def _kind(entry: LayerRecord) -> tuple:
    return entry.window, entry.scale, entry.softcap, entry.query.shape, entry.query.device


def _stacks(layers: dict[int, LayerRecord]) -> Iterator[dict[int, LayerRecord]]:
    """Neighbouring layers of one kind, a few at a time: read together they take little longer than one."""
    for _, alike in itertools.groupby(layers.items(), key=lambda item: _kind(item[1])):
        same = list(alike)
        yield from (dict(same[start : start + STACKED_LAYERS]) for start in range(0, len(same), STACKED_LAYERS))


@torch.no_grad()
def _stack_errors(
    stack: Sequence[LayerRecord], config: LoCoCoConfig, features: torch.Tensor | None
) -> list[list[float]]:
    """Squared error of every KV head, layer by layer, by (layers, kv_heads, tokens, num_features) features."""
    tensors: Any = {
        name: torch.cat([getattr(entry, name) for entry in stack])
        for name in ("query", "key", "value", "output", "gradient")
    }
    entry = dataclasses.replace(stack[0], **tensors)  # (layers, heads or kv_heads, tokens, head_dim)
    error = fisher_error(compressed_output(entry, config, features=features), entry)  # (layers, heads, tokens)
    return error.double().sum(dim=2).unflatten(1, (entry.key.shape[1], -1)).sum(dim=2).tolist()


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
