"""``lococo bench prefill``: reading a text."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from lococo.bench.meter import Meter
from lococo.bench.roofline import Least, Sizes, read_memory, read_work
from lococo.bench.runner import Cell, Row, Topic, random_ids
from lococo.compat import cache_of
from lococo.generation import cache_bytes


class Prefill(Topic):
    """Reading ``length`` tokens in one call, as ``generate`` does, for the logits of the last.

    Patched models cut such a call into pieces of ``prefill_chunk_size`` themselves.
    """

    name = "prefill"
    unit = "text"
    axes = ("tokens in the text", "tokens read per second")

    def least(self, sizes: Sizes, cell: Cell) -> Least:
        """All of the text, and the last token's logits."""
        of_cell = sizes, cell.run.config, cell.length, cell.batch
        return Least(cell.batch * cell.length, read_work(*of_cell), read_memory(*of_cell))

    @torch.no_grad()
    def take(self, model: PreTrainedModel, cell: Cell, meter: Meter) -> dict[str, float | None]:
        """Read the text once."""
        ids = random_ids(model, cell.batch, cell.length)
        with meter.lap():
            output = model(ids, use_cache=True, logits_to_keep=1)
        return {"seconds": meter.seconds()[0], "cache_bytes": cache_bytes(cache_of(output))}

    def shown(self, row: Row, seconds: float) -> float:
        """Tokens per second."""
        return row["length"] * row["batch"] / seconds
