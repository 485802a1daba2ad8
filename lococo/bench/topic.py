"""What is measured: a topic, and its cells."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from lococo.bench.counts import Sizes, Work
from lococo.bench.meter import Meter
from lococo.methods import Run


@dataclasses.dataclass(frozen=True)
class Cell:
    """A method at a length of text and a batch size.

    Attributes
    ----------
    objective : str, optional
        What heads are trained for, where they are trained.
    """

    run: Run
    length: int
    batch: int
    objective: str | None = None

    def __str__(self) -> str:
        slots = f" M={self.run.num_slots}" if self.run.num_slots else ""
        objective = f" {self.objective}" if self.objective else ""
        return f"{self.run.name}{slots}{objective} length={self.length} batch={self.batch}"


class Topic(abc.ABC):
    """A thing to measure.

    Attributes
    ----------
    name : str
        As on the command line.
    unit : str
        What the seconds of a row are for.
    held : tuple of str
        What of a measurement's findings is about memory, told where memory is watched.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    held: ClassVar[tuple[str, ...]] = ("cache_bytes",)

    def settings(self) -> dict[str, Any]:
        """Options that the outcome of a cell depends on, as plain JSON values."""
        return {}

    def check(self, cell: Cell) -> None:
        """Refuse a cell that cannot be measured, before any work.

        Raises
        ------
        ValueError
            If the text is too short.
        """
        if cell.length < 1:
            raise ValueError(f"lengths must be at least 1, got {cell.length}")

    def groups(self, runs: Sequence[Run], lengths: Sequence[int], batches: Sequence[int]) -> list[list[Cell]]:
        """The cells to measure, in groups that are compared with each other."""
        return [[Cell(run, length, batch) for run in runs] for batch in batches for length in lengths]

    @abc.abstractmethod
    def tokens(self, cell: Cell) -> int | None:
        """Tokens of all rows in a unit. None where the unit is no number of tokens."""

    @abc.abstractmethod
    def work(self, sizes: Sizes, cell: Cell) -> Work:
        """What a unit takes at the least."""

    @abc.abstractmethod
    def least_memory(self, sizes: Sizes, cell: Cell) -> int:
        """Bytes that are in use at once, at the least."""

    @abc.abstractmethod
    def take(self, model: PreTrainedModel, cell: Cell, meter: Meter) -> dict[str, float | None]:
        """Measure a cell once on a model with the cell's method in force.

        Returns
        -------
        dict
            ``seconds`` of a unit, ``cache_bytes``, and what else the topic tells; the same keys for every cell.
        """

    def count(self, model: PreTrainedModel, cell: Cell) -> dict[str, float]:
        """What is counted, not timed, once for a cell, on a model with the cell's method in force."""
        return {}


def random_ids(model: PreTrainedModel, batch: int, tokens: int) -> torch.Tensor:
    """(batch, tokens) ids where the model is, the same ones at every call."""
    generator = torch.Generator(model.device).manual_seed(0)
    size = model.config.get_text_config().vocab_size
    return torch.randint(0, size, (batch, tokens), generator=generator, device=model.device)
