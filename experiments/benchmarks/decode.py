"""``python -m experiments.benchmarks decode``: one token after another."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from experiments.benchmarks.counters import HeldBytes, Operations
from experiments.benchmarks.roofline import Least, Sizes, decode_memory, decode_work
from experiments.benchmarks.runner import Cell, Topic
from lococo.bench import speed
from lococo.bench.meter import Meter, release_memory

KEPT_STEPS = 8


class Decode(speed.Decode, Topic):
    """A greedy token after others, beside what it takes at the least; operations and bytes left behind are counted."""

    columns = ("ops_per_step", "kept_bytes_per_step")
    axes = ("tokens in the cache", "milliseconds per step")

    def settings(self) -> dict[str, Any]:
        """Steps: of few, the median is less sure."""
        return {"steps": self.steps}

    def least(self, sizes: Sizes, cell: Cell) -> Least:
        """A token for every row, on average over an open block; a full cache is copied layer by layer to grow."""
        of_cell = sizes, cell.run.config, cell.length, cell.batch
        return Least(cell.batch, decode_work(*of_cell), decode_memory(*of_cell))

    @torch.no_grad()
    def count(self, model: PreTrainedModel, cell: Cell) -> dict[str, float]:
        """Operations dispatched in an ordinary step, and bytes of tensors that a token leaves behind.

        Those are counted from a place in one block to the same place in the next: masks are made once for each place,
        or again and again for a few.
        """
        ids = speed.random_ids(model, cell.batch, 1)
        reader = speed.Reader(model, speed.filled_cache(model, cell), ids, Meter(model.device))
        block = speed.open_block(cell.run.config)
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
