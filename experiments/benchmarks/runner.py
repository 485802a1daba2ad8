"""Measuring a grid of cells: methods in turn, every finding kept, an end in time; and its rows and pictures."""

from __future__ import annotations

import abc
import dataclasses
import importlib.util
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel

from experiments.benchmarks.roofline import Least, Limits, Sizes, device_memory, measure_limits
from lococo.bench import speed
from lococo.bench.meter import Meter, is_out_of_memory, release_memory
from lococo.files import write_whole
from lococo.methods import Run
from lococo.results.deadline import Deadline, OutOfTime
from lococo.results.journal import Journal
from lococo.results.plots import GAP, Lines, Panel, Series, picture, thousands
from lococo.results.tables import beside, device_name, write_result

Row = dict[str, Any]
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Cell(speed.Cell):
    """A method at a length of text and a batch size.

    Attributes
    ----------
    objective : str, optional
        What heads are trained for, where they are trained.
    """

    objective: str | None = None

    def __str__(self) -> str:
        slots = f" M={self.run.num_slots}" if self.run.num_slots else ""
        objective = f" {self.objective}" if self.objective else ""
        return f"{self.run.name}{slots}{objective} length={self.length} batch={self.batch}"


class Topic(speed.Measurement):
    """A thing to measure, with what is told of it.

    Attributes
    ----------
    held : tuple of str
        What of a measurement's findings is about memory, told where memory is watched.
    columns : tuple of str
        What the table shows besides ``COLUMNS``.
    axes : tuple of str
        What a picture's length and time are called.
    """

    held: ClassVar[tuple[str, ...]] = ("cache_bytes",)
    columns: ClassVar[tuple[str, ...]] = ()
    axes: ClassVar[tuple[str, str]] = ("tokens in a window", "milliseconds per token")

    def settings(self) -> dict[str, Any]:
        """Options that the outcome of a cell depends on, as plain JSON values."""
        return {}

    def groups(self, runs: Sequence[Run], lengths: Sequence[int], batches: Sequence[int]) -> list[list[Cell]]:
        """The cells to measure, in groups that are compared with each other."""
        return [[Cell(run, length, batch) for run in runs] for batch in batches for length in lengths]

    @abc.abstractmethod
    def least(self, sizes: Sizes, cell: Cell) -> Least:
        """What a unit takes at the least."""

    def count(self, model: PreTrainedModel, cell: Cell) -> dict[str, float]:
        """What is counted, not timed, once for a cell, on a model with the cell's method in force."""
        return {}

    def shown(self, row: Row, seconds: float) -> float:
        """A time of a row as a picture shows it."""
        return 1000 * seconds

    def panels(self, rows: Sequence[Row]) -> list[list[Panel | None]]:
        """What a picture of rows shows: time, and memory where it is known, against length; a column per batch."""
        batches = sorted({row["batch"] for row in rows})
        by_batch = [[row for row in rows if row["batch"] == batch] for batch in batches]
        grid: list[list[Panel | None]] = [[self._times(each) for each in by_batch]]
        if any(row["peak_bytes"] for row in rows):
            grid.append([self._memory(each) for each in by_batch])
        return grid

    def _times(self, rows: Sequence[Row]) -> Panel:
        series = []
        for index, (name, line) in enumerate(_lines(rows).items()):
            lengths, color = [row["length"] for row in line], {"color": f"C{index}"}
            median, low, high, limit = (
                [GAP if row[key] is None else self.shown(row, row[key]) for row in line]
                for key in ("median", "min", "max", "limit_seconds")
            )
            series.append(Series(name, median, lengths, low, high, color))
            series.append(Series("", limit, lengths, style={**color, "marker": "", "linestyle": ":", "linewidth": 1}))
        return Lines(series, f"batch {rows[0]['batch']}", "", self.axes[1], "xy", _ticks(rows))

    def _memory(self, rows: Sequence[Row]) -> Panel:
        series = [
            Series(name, [(row["peak_bytes"] or GAP) / GIB for row in line], [row["length"] for row in line])
            for name, line in _lines(rows).items()
        ]
        return Lines(series, "", self.axes[0], "peak memory (GiB)", "x", _ticks(rows), bottom=0)


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    lines: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["length"]):
        lines.setdefault(line_name(row), []).append(row)
    return {name: lines[name] for name in dict.fromkeys(map(line_name, rows))}


def _ticks(rows: Sequence[Row]) -> dict[float, str]:
    return {length: thousands(length) for length in sorted({row["length"] for row in rows})}


def line_name(row: Row) -> str:
    """What rows of one line in a picture have in common."""
    slots = f", {row['num_slots']} slots" if row["num_slots"] else ""
    objective = f", {row['objective']}" if row["objective"] else ""
    return f"{row['method']}{slots}{objective}"


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


@dataclasses.dataclass
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
    time_limit : float, optional
        Seconds after which no measurement begins.
    counts : bool
        Whether topics count what they count apart from any time. It takes as long as several measurements.
    """

    subject: Subject
    topic: Topic
    groups: Sequence[Sequence[Cell]]
    repeats: int
    journal: Journal
    time_limit: float | None = None
    counts: bool = True

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")
        self._failed: dict[Cell, str] = {}
        self.sizes = Sizes.of(self.subject.model)
        self._identity = self.subject.identity
        self._runs = {cell.run: cell.run.identity() for cell in self.cells}
        self._deadline = Deadline(self.time_limit)

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
        needed, there = self.topic.least(self.sizes, cell).memory, device_memory(self.device)
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
            with run.applied(self.subject.model):
                return action(self.subject.model)
        except Exception as error:
            reason, is_too_large = str(error).partition("\n")[0], is_out_of_memory(error)
            if not is_too_large:
                traceback.print_exc()
                self._failed[cell] = f"{type(error).__name__}: {reason}"
        # Here the error, and what its traceback held, is gone.
        if is_too_large:
            needed = max(self.topic.least(self.sizes, cell).memory, meter.peak() or 0)
            self._skip(cell, f"out of memory: {reason}", needed)
        release_memory(self.device)
        return None

    def _skip(self, cell: Cell, reason: str, needed: int) -> None:
        self.journal.measure(self._key(cell, "skipped"), lambda: {"skipped": reason, "needed_bytes": needed})


# What the Markdown table shows; the JSON has all.
COLUMNS = (
    "method",
    "num_slots",
    "length",
    "batch",
    "unit",
    "median",
    "min",
    "max",
    "tokens_per_second",
    "speedup_over_full",
    "time_over_streaming",
    "limit_share",
    "peak_bytes",
    "cache_bytes",
    "skipped",
)


def rows_of(grid: Grid) -> list[Row]:
    """One row per cell that has been measured or left out.

    ``median``, ``min`` and ``max`` are seconds per ``unit``. ``speedup_over_full`` is the full cache's median over
    this one, ``time_over_streaming`` this median over that of the sliding window with as many slots, both at the same
    length and batch. ``limit_seconds`` is the least time that the device's measured rates allow, ``limit_share`` its
    share in the median. ``needed_bytes`` is the least memory by count; for a cell that was left out, what is known of
    it.
    """
    done = [cell for cell in grid.cells if grid.is_done(cell)]
    if not done:
        return []
    limits = grid.limits()
    rows = [_row(grid, cell, limits) for cell in done]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


def _row(grid: Grid, cell: Cell, limits: Limits) -> Row:
    turns, skipped, least = _turns(grid, cell), grid.skipped(cell), grid.topic.least(grid.sizes, cell)
    seconds = [turn["seconds"] for turn in turns]
    median = statistics.median(seconds) if seconds else None
    full, streaming = (_median_beside(grid, cell, name) for name in ("full", "streaming"))
    least_seconds = least.work.seconds(limits.flops_per_second, limits.bytes_per_second)
    row = {
        "shape": grid.subject.name,
        **cell.run.columns,
        "length": cell.length,
        "batch": cell.batch,
        "objective": cell.objective,
        "dtype": str(grid.subject.model.dtype).removeprefix("torch."),
        "unit": grid.topic.unit,
        "repeats": len(seconds),
        "median": median,
        "min": min(seconds, default=None),
        "max": max(seconds, default=None),
        "tokens_per_second": least.tokens / median if least.tokens and median else None,
        "speedup_over_full": full / median if full and median else None,
        "time_over_streaming": median / streaming if streaming and median else None,
        "limit_seconds": least_seconds,
        "limit_share": least_seconds / median if median else None,
        "peak_bytes": None,
        "cache_bytes": None,
        **({} if skipped else grid.memory(cell)),
        "needed_bytes": least.memory,
        "skipped": None,
        **(skipped or {}),
    }
    for name in turns[0] if turns else ():  # what else a topic tells
        if name != "seconds" and name not in row:
            found = [turn[name] for turn in turns if turn[name] is not None]
            row[name] = statistics.median(found) if found else None
    return row


def _turns(grid: Grid, cell: Cell) -> list[Row]:
    return [] if grid.skipped(cell) else grid.turns(cell)


def _median_beside(grid: Grid, cell: Cell, method: str) -> float | None:
    """Median of a method in the same place of the grid."""
    slots = None if method == "full" else cell.run.num_slots
    for other in grid.cells:
        is_same = (other.length, other.batch, other.run.num_slots) == (cell.length, cell.batch, slots)
        if other.run.name == method and is_same and grid.is_done(other):
            seconds = [turn["seconds"] for turn in _turns(grid, other)]
            return statistics.median(seconds) if seconds else None
    return None


def columns(topic: Topic, rows: Sequence[Row]) -> list[str]:
    """Names of the columns that the Markdown table of a topic shows."""
    return [name for name in (*COLUMNS, *topic.columns) if rows and name in rows[0]]


def plot(topic: Topic, rows: Sequence[Row], path: Path) -> None:
    """Draw the measured rows of a topic into a PNG file; none if no time was taken. One not taken is a gap."""
    measured = [row for row in rows if row["median"] is not None or row.get("peak_bytes")]
    grid = topic.panels(measured) if any(row["median"] is not None for row in rows) else []
    if not grid:
        return
    limits = "; dotted: the least time the device allows" if isinstance(grid[0][0], Lines) else ""
    title = f"{rows[0]['shape']}, {rows[0]['dtype']}{limits}"
    size = (max(7, 4 * len(grid[0])), 1 + 3.8 * len(grid))
    write_whole(path, picture(grid, size, title=title, share=True))


def write_grid(grid: Grid, output: Path, command: str) -> list[Row]:
    """Write ``<output>.json``, ``.md`` and, if matplotlib is installed, ``.png``; none of them if nothing is measured.

    Returns
    -------
    list of dict
        The rows, with the columns that the table shows.
    """
    rows = rows_of(grid)
    if not rows:
        return []
    shown = columns(grid.topic, rows)
    facts: dict[str, Any] = {"commits": grid.journal.commits, "limits": dataclasses.asdict(grid.limits())}
    write_result(output, command, grid.device, rows, columns=shown, **facts)
    if importlib.util.find_spec("matplotlib") is None:
        print(f"{output}: no picture, matplotlib is not installed", file=sys.stderr)
    else:
        plot(grid.topic, rows, beside(output, ".png"))
    return [{name: row[name] for name in shown} for row in rows]
