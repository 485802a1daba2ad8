"""``python -m experiments.benchmarks score``: what choosing heavy hitters costs."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from experiments.benchmarks.counters import HeldBytes
from experiments.benchmarks.roofline import Least, Sizes, decode_memory, segment_work
from experiments.benchmarks.runner import Cell, Row, Topic, line_name
from lococo.bench import speed
from lococo.bench.meter import Meter
from lococo.cache.buffers import KVBuffer
from lococo.cache.cache import LoCoCoCache
from lococo.compat import with_cache
from lococo.generation import cache_bytes, random_full_cache
from lococo.kernels import scoring as kernels
from lococo.methods import Run
from lococo.models import base_shape, find_family
from lococo.results.plots import Bars, Panel, Series
from lococo.state import patch_of

FIGURES = ("score_seconds", "score_share", "score_bytes", "score_largest_bytes", "matrix_bytes")


class Score(Topic):
    """A layer reading one block of B tokens after M others, and the share that scoring the entries has in it.

    ``length`` is M + B, what the last query of the block sees. ``score_bytes`` are held at once by scoring beside
    queries and keys, ``score_largest_bytes`` by its largest tensor; ``matrix_bytes`` would hold the block's attention
    as one matrix in float32.

    Parameters
    ----------
    block_size : int
        B.
    """

    name = "score"
    unit = "block and layer"
    columns = ("score_share", "score_bytes", "matrix_bytes")

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size

    def settings(self) -> dict[str, Any]:
        """The block, which the command line's length does not say."""
        return {"block_size": self.block_size}

    def groups(self, runs: Sequence[Run], lengths: Sequence[int], batches: Sequence[int]) -> list[list[Cell]]:
        """A group for every number of slots, which says the length."""
        budgets = dict.fromkeys(run.num_slots for run in runs if run.num_slots)
        return [
            [Cell(run, slots + self.block_size, batch) for run in runs if run.num_slots in (None, slots)]
            for batch in batches
            for slots in budgets
        ]

    def least(self, sizes: Sizes, cell: Cell) -> Least:
        """A layer's share of reading the block."""
        past = cell.length - self.block_size
        work = segment_work(sizes, cell.run.config, self.block_size, past, cell.batch)
        return Least(None, work, decode_memory(sizes, cell.run.config, cell.length, cell.batch))

    @torch.no_grad()
    def take(self, model: PreTrainedModel, cell: speed.Cell, meter: Meter) -> dict[str, float | None]:
        """Read a block with all layers, then score for the first of them alone."""
        config = cell.run.config
        with meter.apart():
            if config is None:
                cache: Any = random_full_cache(model, cell.length - self.block_size, cell.batch)
            else:
                cache = speed.compressed_cache(model, config, cell.batch)
        decoder, ids = find_family(model).decoder, speed.random_ids(model, cell.batch, self.block_size)
        with meter.lap():
            decoder(input_ids=ids, **with_cache(decoder, cache), use_cache=True)
        seconds = meter.seconds()[0] / base_shape(model)["num_layers"]
        figures = _scoring_figures(model, cache, self.block_size, seconds, meter)
        return {"seconds": seconds, "cache_bytes": cache_bytes(cache), **dict(zip(FIGURES, figures, strict=True))}

    def panels(self, rows: Sequence[Row]) -> list[list[Panel | None]]:
        """A bar per method that scores: its share of a layer's time."""
        scored = [row for row in rows if row.get("score_share") is not None]
        if not scored:
            return []
        names = [f"{line_name(row)}, batch {row['batch']}" for row in scored]
        shares = Series("", [100 * row["score_share"] for row in scored])
        label = f"time of scoring (% of a layer reading a block of {self.block_size} tokens)"
        return [[Bars(names, [shares], xlabel=label)]]


def _scoring_figures(
    model: PreTrainedModel, cache: Any, queries: int, seconds: float, meter: Meter
) -> tuple[float | None, ...]:
    buffers = cache.layers[0].views() if isinstance(cache, LoCoCoCache) else []
    scorings = [scoring(model, buffer, queries) for buffer in buffers if buffer.entries.scores is not None]
    if not scorings:
        return (None,) * len(FIGURES)
    with HeldBytes() as held:  # on its own: counting takes time
        for score in scorings:
            score()
    for _ in range(10):
        with meter.lap():
            for score in scorings:
                score()
    score_seconds = statistics.median(meter.seconds())
    entries = sum(buffer.keys[..., 0].numel() for buffer in buffers)  # of all KV heads and rows
    matrix = 4 * query_heads_per_kv_head(model) * queries * entries
    return score_seconds, score_seconds / seconds, held.peak, held.largest, matrix


def scoring(model: PreTrainedModel, buffer: KVBuffer, queries: int) -> Callable[[], torch.Tensor]:
    """What a patched model's first layer calls to score the entries of a memory for a block of queries."""
    config, keys, head = buffer.config, buffer.keys, patch_of(model).heads.get(0)
    batch, kv_heads, entries, head_dim = keys.shape
    heads = query_heads_per_kv_head(model) * kv_heads
    query = torch.randn(batch, heads, queries, head_dim, device=keys.device, dtype=keys.dtype)
    bias = buffer.entries.log_mass if head is not None and not head.is_closed else None
    visibility, scale = kernels.LogitBias(bias=bias), 1 / math.sqrt(head_dim)
    with torch.no_grad():
        lse = kernels.attend_and_lse(query, keys, buffer.values, scale, visibility, "auto")[1]
    mass = functools.partial(kernels.attention_mass, query, keys, scale, visibility, lse=lse)
    return functools.partial(mass, squared=config.score_power == 2, delay=config.score_delay)


def query_heads_per_kv_head(model: PreTrainedModel) -> int:
    """How many query heads share a key-value head."""
    return model.config.get_text_config().num_attention_heads // base_shape(model)["num_kv_heads"]
