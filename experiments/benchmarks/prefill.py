"""``python -m experiments.benchmarks prefill``: reading a text."""

from __future__ import annotations

from experiments.benchmarks.roofline import Least, Sizes, read_memory, read_work
from experiments.benchmarks.runner import Cell, Row, Topic
from lococo.bench import speed


class Prefill(speed.Prefill, Topic):
    """Reading a text in one call, beside what it takes at the least."""

    axes = ("tokens in the text", "tokens read per second")

    def least(self, sizes: Sizes, cell: Cell) -> Least:
        """All of the text, and the last token's logits."""
        of_cell = sizes, cell.run.config, cell.length, cell.batch
        return Least(cell.batch * cell.length, read_work(*of_cell), read_memory(*of_cell))

    def shown(self, row: Row, seconds: float) -> float:
        """Tokens per second."""
        return row["length"] * row["batch"] / seconds
