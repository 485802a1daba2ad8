"""Rows of a result from a measured grid."""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lococo.bench.grid import Grid
from lococo.bench.limits import Limits
from lococo.bench.pictures import plot
from lococo.bench.topic import Cell
from lococo.results.tables import beside, write_result

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
EXTRA_COLUMNS = {
    "decode": ("ops_per_step", "kept_bytes_per_step"),
    "train": ("objective",),
    "extend": ("saved_bytes",),
    "score": ("score_share", "score_bytes", "matrix_bytes"),
}


def rows_of(grid: Grid) -> list[dict[str, Any]]:
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
    rows = [{**_place(grid, cell), **_time(grid, cell, limits), **_memory(grid, cell)} for cell in done]
    rows = [{**row, **_extras(grid, cell, row)} for row, cell in zip(rows, done, strict=True)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


def _place(grid: Grid, cell: Cell) -> dict[str, Any]:
    config = cell.run.config
    return {
        "shape": grid.subject.name,
        "method": cell.run.name,
        "num_slots": cell.run.num_slots,
        "block_size": None if config is None else config.block_size,
        "length": cell.length,
        "batch": cell.batch,
        "objective": cell.objective,
        "dtype": str(grid.subject.model.dtype).removeprefix("torch."),
        "unit": grid.topic.unit,
    }


def _time(grid: Grid, cell: Cell, limits: Limits) -> dict[str, Any]:
    seconds = [turn["seconds"] for turn in _turns(grid, cell)]
    median, tokens = statistics.median(seconds) if seconds else None, grid.topic.tokens(cell)
    full, streaming = (_median_beside(grid, cell, name) for name in ("full", "streaming"))
    least = grid.topic.work(grid.sizes, cell).seconds(limits.flops_per_second, limits.bytes_per_second)
    return {
        "repeats": len(seconds),
        "median": median,
        "min": min(seconds, default=None),
        "max": max(seconds, default=None),
        "tokens_per_second": tokens / median if tokens and median else None,
        "speedup_over_full": full / median if full and median else None,
        "time_over_streaming": median / streaming if streaming and median else None,
        "limit_seconds": least,
        "limit_share": least / median if median else None,
    }


def _memory(grid: Grid, cell: Cell) -> dict[str, Any]:
    skipped = grid.skipped(cell)
    return {
        **{"peak_bytes": None, "cache_bytes": None},
        **({} if skipped else grid.memory(cell)),
        **{"needed_bytes": grid.topic.least_memory(grid.sizes, cell), "skipped": None},
        **(skipped or {}),
    }


def _extras(grid: Grid, cell: Cell, row: Mapping[str, Any]) -> dict[str, Any]:
    """Medians of what else a topic tells."""
    turns = _turns(grid, cell)
    values = {
        name: [turn[name] for turn in turns if turn[name] is not None]
        for name in (turns[0] if turns else ())
        if name != "seconds" and name not in row
    }
    return {name: statistics.median(found) if found else None for name, found in values.items()}


def _turns(grid: Grid, cell: Cell) -> list[dict[str, Any]]:
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


def columns(topic: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the columns that the Markdown table of a topic shows."""
    return [name for name in (*COLUMNS, *EXTRA_COLUMNS.get(topic, ())) if rows and name in rows[0]]


def write_grid(grid: Grid, rows: Sequence[dict[str, Any]], output: Path, command: str) -> None:
    """Write ``<output>.json``, ``.md`` and, if matplotlib is installed, ``.png``."""
    shown = columns(grid.topic.name, rows)
    write_result(output, command, grid.device, rows, shown, limits=dataclasses.asdict(grid.limits()))
    if importlib.util.find_spec("matplotlib") is None:
        print(f"{output}: no picture, matplotlib is not installed", file=sys.stderr)
    else:
        plot(grid.topic.name, rows, beside(output, ".png"))
