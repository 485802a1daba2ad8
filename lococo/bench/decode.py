"""``lococo bench decode``: one token after another."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from lococo.bench.meter import HeldBytes, Meter, Operations, release_memory
from lococo.bench.roofline import Least, Sizes, decode_memory, decode_work, open_block
from lococo.bench.runner import Cell, Topic, random_ids
from lococo.compat import cache_of, with_cache
from lococo.config import LoCoCoConfig
from lococo.generation import cache_bytes
from lococo.models import base_shape

KEPT_STEPS = 8


class Decode(Topic):
    """A greedy token after ``length`` others, through the model's forward alone.

    The full cache is the one that ``generate`` makes, ``DynamicCache``, which copies itself at every step to grow; it
    is filled with random numbers. A compressed cache reads until it is full, which is the same at every length. It
    compresses once in every block of B tokens: ordinary steps are timed in the middle of the open block and the step
    that compresses at its end, and a token's time is their mean over a block, ``((B - 1) step + compressing) / B``.

    Parameters
    ----------
    steps : int
        Tokens timed, at least; of ordinary steps the median counts.
    """

    name = "decode"
    unit = "step"
    columns = ("ops_per_step", "kept_bytes_per_step")
    axes = ("tokens in the cache", "milliseconds per step")

    def __init__(self, steps: int = 32) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.steps = steps

    def settings(self) -> dict[str, Any]:
        """Steps: of few, the median is less sure."""
        return {"steps": self.steps}

    def check(self, cell: Cell) -> None:
        """Refuse a text shorter than a block: a compressed cache is filled with whole ones."""
        block_size = 1 if cell.run.config is None else cell.run.config.block_size
        if cell.length < block_size:
            raise ValueError(f"lengths must be at least one block of {block_size} tokens, got {cell.length}")

    def least(self, sizes: Sizes, cell: Cell) -> Least:
        """A token for every row, on average over an open block; a full cache is copied layer by layer to grow."""
        of_cell = sizes, cell.run.config, cell.length, cell.batch
        return Least(cell.batch, decode_work(*of_cell), decode_memory(*of_cell))

    @torch.no_grad()
    def take(self, model: PreTrainedModel, cell: Cell, meter: Meter) -> dict[str, float | None]:
        """Decode whole blocks, or steps of the full cache."""
        config = cell.run.config
        with meter.apart():
            cache = _cache_of(model, cell)
        held, block = cache_bytes(cache), open_block(config)
        reader = _Reader(model, cache, random_ids(model, cell.batch, 1), meter)
        if block == 1:
            step = compressing = statistics.median(reader.decode(self.steps))
        else:
            step, compressing = self._whole_blocks(reader, block)
        return {
            "seconds": ((block - 1) * step + compressing) / block,
            "cache_bytes": held,
            "step_seconds": step,
            "compressing_seconds": None if config is None else compressing,
        }

    @torch.no_grad()
    def count(self, model: PreTrainedModel, cell: Cell) -> dict[str, float]:
        """Operations dispatched in an ordinary step, and bytes of tensors that a token leaves behind.

        Those are counted from a place in one block to the same place in the next: masks are made once for each place,
        or again and again for a few.
        """
        reader = _Reader(model, _cache_of(model, cell), random_ids(model, cell.batch, 1), Meter(model.device))
        block = open_block(cell.run.config)
        steps = KEPT_STEPS if block == 1 else min(KEPT_STEPS, block)
        tokens = max(steps, block)
        counter, held = HeldBytes(), []
        for _ in range(3):  # the first makes what is made once
            with counter:
                reader.decode(steps)
            release_memory(model.device)
            held.append(counter.held)
            reader.read(tokens - steps)
        reader.decode(1)  # after a longer call, or at the start of a block, there is more to do
        with Operations() as operations:
            reader.decode(1)
        return {"ops_per_step": operations.count, "kept_bytes_per_step": (held[2] - held[1]) / tokens}

    def _whole_blocks(self, reader: _Reader, block: int) -> tuple[float, float]:
        """Seconds of an ordinary step and of one that compresses, in as many blocks as it takes."""
        timed = min(self.steps, block - 1)
        before = (block - 1 - timed) // 2
        steps, compressing = [], []
        for _ in range(-(-self.steps // block)):
            compressing += reader.decode(1)  # the block before this one, which is complete
            reader.read(before)
            steps += reader.decode(timed)
            reader.read(block - 1 - before - timed)
        return statistics.median(steps), statistics.median(compressing)


class _Reader:
    def __init__(self, model: PreTrainedModel, cache: Any, token: torch.Tensor, meter: Meter) -> None:
        self.model, self.held, self.token, self.meter = model, with_cache(model, cache), token, meter
        self.call = model.__call__  # as generate does: steps may be replayed

    def read(self, tokens: int) -> None:
        """Read tokens in one go, for which neither time nor memory counts."""
        if tokens:
            ids = random_ids(self.model, self.token.shape[0], tokens)
            with self.meter.apart():
                self.model(ids, **self.held, use_cache=True, logits_to_keep=1)

    def decode(self, steps: int) -> list[float]:
        """Read the most probable token, so many times. Returns the seconds of each."""
        for _ in range(steps):
            with self.meter.lap():
                output = self.call(input_ids=self.token, **self.held, use_cache=True, logits_to_keep=1)
                self.token = output.logits[:, -1:].argmax(dim=-1)
        return self.meter.seconds()


def _cache_of(model: PreTrainedModel, cell: Cell) -> Any:
    if cell.run.config is None:
        return random_full_cache(model, cell.length, cell.batch)
    return compressed_cache(model, cell.run.config, cell.batch, cell.length)


def compressed_cache(model: PreTrainedModel, config: LoCoCoConfig, batch: int, length: int | None = None) -> Any:
    """The cache of a patched model after a text, without reading all of it.

    Whole blocks are read until the slots are full and a block is complete: more text changes what the cache holds,
    not how much it holds nor how long the next token takes.

    Parameters
    ----------
    length : int, optional
        Tokens of the text, a block or more, where they may be too few to fill the slots.
    """
    most = max([config.num_slots, *(slots for layer in config.slots_per_head or () for slots in layer)])
    blocks = -(-most // config.block_size) + 1
    if length is not None:
        blocks = min(blocks, length // config.block_size)
    ids = random_ids(model, batch, blocks * config.block_size)
    return cache_of(model(ids, use_cache=True, logits_to_keep=1))


def random_full_cache(model: PreTrainedModel, length: int, batch: int) -> DynamicCache:
    """The full cache after a text, filled with random numbers."""
    shape = base_shape(model)
    cache = DynamicCache(config=model.config)
    size = (batch, shape["num_kv_heads"], length, shape["head_dim"])
    for layer in range(shape["num_layers"]):
        key = torch.randn(size, device=model.device, dtype=model.dtype)
        cache.update(key, torch.randn_like(key), layer)
    return cache
