"""Measuring a grid of cells: methods in turn, every finding kept, and an end in time."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel

from lococo.bench.counts import Sizes
from lococo.bench.limits import Limits, device_memory, measure_limits
from lococo.bench.meter import Meter, is_out_of_memory, release_memory
from lococo.bench.topic import Cell, Topic
from lococo.methods import as_method
from lococo.results.deadline import Deadline, OutOfTime
from lococo.results.journal import Journal
from lococo.results.tables import device_name

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model that is measured, and what it is called."""

    name: str
    model: PreTrainedModel

    @property
    def identity(self) -> list[Any]:
        """What its speed depends on besides the method: the model, the device and the software."""
        sizes = dataclasses.astuple(Sizes.of(self.model))
        software = [str(torch.__version__), transformers.__version__, torch.get_num_threads()]
        return [self.name, list(sizes), str(self.model.dtype), device_name(self.model.device), *software]


class Grid:
    """Cells of a topic, measured so often that medians can be trusted.

    The cells of a group are compared with each other: each is measured once to warm up, which also tells its peak of
    memory, then all of them in turn, ``repeats`` times, so that what changes on the machine meets all alike. Every
    single measurement is journaled. A cell that is too large for the device is left out with the reason. One that
    fails is given up, and the others are measured.

    Parameters
    ----------
    subject : Subject
        Not patched.
    groups : sequence of sequences of Cell
        In order of importance.
    repeats : int
        Measurements of each cell.
    journal : Journal
    time_limit : float, optional
        Seconds after which no measurement begins.
    counts : bool
        Whether topics count what they count apart from any time. It takes as long as several measurements.
    """

    def __init__(
        self,
        subject: Subject,
        topic: Topic,
        groups: Sequence[Sequence[Cell]],
        repeats: int,
        journal: Journal,
        time_limit: float | None = None,
        counts: bool = True,
    ) -> None:
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {repeats}")
        self.subject, self.topic, self.groups = subject, topic, groups
        self.repeats, self.journal, self.counts = repeats, journal, counts
        self._failed: dict[Cell, str] = {}
        self.sizes = Sizes.of(subject.model)
        self._identity = subject.identity
        self._runs = {cell.run: cell.run.identity() for cell in self.cells}
        self._deadline = Deadline(time_limit)

    @property
    def cells(self) -> list[Cell]:
        """All cells."""
        return [cell for group in self.groups for cell in group]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.subject.model.device

    def run(self) -> list[Cell]:
        """Measure what has not been measured. Returns the cells for which there was no time.

        Raises
        ------
        RuntimeError
            At the end, if cells failed.
        """
        try:
            self._deadline.check()
            self.limits()  # now: there are errors after which a GPU does nothing more
            with tqdm(total=len(self.cells) * self.repeats, desc=self.topic.name, disable=None) as bar:
                for group in self.groups:
                    for cell in self._measurements(group):
                        bar.set_postfix_str(str(cell))
                        bar.update()
        except OutOfTime:
            pass
        if self._failed:
            cell, reason = next(iter(self._failed.items()))
            raise RuntimeError(f"{len(self._failed)} of {len(self.cells)} cells failed, first {cell}: {reason}")
        return [cell for cell in self.cells if not self.is_done(cell)]

    def limits(self) -> Limits:
        """What the device can do, measured once a run."""
        key = ["limits", *self._identity]
        model = self.subject.model
        found = self.journal.measure(key, lambda: dataclasses.asdict(measure_limits(model.device, model.dtype)))
        return Limits(**found)

    def is_done(self, cell: Cell) -> bool:
        """Whether a cell has been measured, or left out for good."""
        return self.skipped(cell) is not None or len(self.turns(cell)) == self.repeats

    def skipped(self, cell: Cell) -> dict[str, Any] | None:
        """Why a cell was left out, and the bytes it would have needed. None if it was not."""
        return self.journal.recall(self._key(cell, "skipped"))

    def memory(self, cell: Cell) -> dict[str, Any]:
        """What was held in memory while a cell was measured, and what its topic counts."""
        return self.journal.recall(self._memory_key(cell)) or {}

    def turns(self, cell: Cell) -> list[dict[str, Any]]:
        """What a cell's measurements found so far."""
        found = (self.journal.recall(self._key(cell, turn)) for turn in range(self.repeats))
        return [turn for turn in found if turn is not None]

    def _memory_key(self, cell: Cell) -> list[Any]:
        return self._key(cell, "memory" if self.counts else "memory alone")

    def _key(self, cell: Cell, what: str | int) -> list[Any]:
        of_cell = [cell.run.name, self._runs[cell.run], cell.length, cell.batch, cell.objective]
        return [what, self.topic.name, self.topic.settings(), *of_cell, *self._identity]

    def _measurements(self, group: Sequence[Cell]) -> Iterator[Cell]:
        release_memory(self.device)
        for cell in group:
            if not self.is_done(cell):
                self._warm_up(cell)
        for turn in range(self.repeats):
            for cell in group:
                is_measurable = self.skipped(cell) is None and cell not in self._failed
                if is_measurable and self.journal.recall(self._key(cell, turn)) is None:
                    self._measure(cell, turn)
                yield cell

    def _warm_up(self, cell: Cell) -> None:
        needed, there = self.topic.least_memory(self.sizes, cell), device_memory(self.device)
        if there is not None and needed > there:
            self._skip(cell, f"needs at least {needed / GIB:.1f} GiB, the device has {there / GIB:.1f}", needed)
            return
        meter = Meter(self.device, watches_memory=True)
        found = self._attempt(cell, meter, lambda model: self.topic.take(model, cell, meter))
        if found is None:
            return
        held = {"peak_bytes": meter.peak(), **{name: found[name] for name in self.topic.held}}
        counts = self._attempt(cell, meter, lambda model: self.topic.count(model, cell) if self.counts else {})
        if counts is not None:
            self.journal.measure(self._memory_key(cell), lambda: {**held, **counts})

    def _measure(self, cell: Cell, turn: int) -> None:
        meter = Meter(self.device)
        found = self._attempt(cell, meter, lambda model: self.topic.take(model, cell, meter))
        if found is not None:
            self.journal.measure(self._key(cell, turn), lambda: found)

    def _attempt(
        self, cell: Cell, meter: Meter, action: Callable[[PreTrainedModel], dict[str, Any]]
    ) -> dict[str, Any] | None:
        """Act with a cell's method in force. None if that fails; that the device has no room is journaled."""
        self._deadline.check()
        run = cell.run
        try:
            with as_method(self.subject.model, run.config, run.heads):
                return action(self.subject.model)
        except Exception as error:
            reason, is_too_large = str(error).partition("\n")[0], is_out_of_memory(error)
            if not is_too_large:
                traceback.print_exc()
                self._failed[cell] = f"{type(error).__name__}: {reason}"
        # Here the error, and what its traceback held, is gone.
        if is_too_large:
            needed = max(self.topic.least_memory(self.sizes, cell), meter.peak() or 0)
            self._skip(cell, f"out of memory: {reason}", needed)
        release_memory(self.device)
        return None

    def _skip(self, cell: Cell, reason: str, needed: int) -> None:
        self.journal.measure(self._key(cell, "skipped"), lambda: {"skipped": reason, "needed_bytes": needed})
