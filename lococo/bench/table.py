"""Rows of a result from a measured grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lococo.bench.grid import Grid
from lococo.bench.limits import Limits
from lococo.bench.topic import Cell

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
EXTRA_COLUMNS = {"train": ("objective",), "score": ("score_share", "score_bytes", "matrix_bytes")}


def rows_of(grid: Grid) -> list[dict[str, Any]]:
    """One row per cell that has been measured or left out.

    ``median``, ``min`` and ``max`` are seconds per ``unit``. ``speedup_over_full`` is the full cache's median over
    this one, ``time_over_streaming`` this median over that of the sliding window with as many slots, both at the same
    length and batch. ``limit_seconds`` is the least time that the device's measured rates allow, ``limit_share`` its
    share in the median. ``needed_bytes`` is the least memory by count; for a cell that was left out, what is known of
    it.
    """
    done = [cell for cell in grid.cells if grid.is_done(cell)]
    limits = grid.limits() if done else None
    rows = [_row(grid, cell, limits) for cell in done]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


def _row(grid: Grid, cell: Cell, limits: Limits | None) -> dict[str, Any]:
    assert limits is not None
    run, topic, skipped = cell.run, grid.topic, grid.skipped(cell)
    seconds = [] if skipped else [turn["seconds"] for turn in grid.turns(cell)]
    median, tokens = None if skipped else grid.median(cell, "seconds"), topic.tokens(cell)
    least = topic.work(grid.sizes, cell).seconds(limits.flops_per_second, limits.bytes_per_second)
    full, streaming = (_median_beside(grid, cell, name) for name in ("full", "streaming"))
    row = {
        "shape": grid.subject.name,
        "method": run.name,
        "num_slots": run.num_slots,
        "block_size": None if run.config is None else run.config.block_size,
        "length": cell.length,
        "batch": cell.batch,
        "objective": cell.objective,
        "dtype": str(grid.subject.model.dtype).removeprefix("torch."),
        "unit": topic.unit,
        "repeats": len(seconds),
        "median": median,
        "min": min(seconds, default=None),
        "max": max(seconds, default=None),
        "tokens_per_second": tokens / median if tokens and median else None,
        "speedup_over_full": full / median if full and median else None,
        "time_over_streaming": median / streaming if streaming and median else None,
        "limit_seconds": least,
        "limit_share": least / median if median else None,
        "peak_bytes": None,
        "cache_bytes": None,
        **({} if skipped else grid.memory(cell)),
        "needed_bytes": topic.least_memory(grid.sizes, cell),
        "skipped": None,
        **(skipped or {}),
    }
    extras = {} if skipped else dict.fromkeys(name for turn in grid.turns(cell) for name in turn if name not in row)
    return {**row, **{name: grid.median(cell, name) for name in extras if name != "seconds"}}


def _median_beside(grid: Grid, cell: Cell, method: str) -> float | None:
    """Median of a method in the same place of the grid."""
    for other in grid.cells:
        is_same = other.run.name == method and (other.length, other.batch) == (cell.length, cell.batch)
        slots = (None, cell.run.num_slots) if method == "full" else (cell.run.num_slots,)
        if is_same and other.run.num_slots in slots and grid.is_done(other) and not grid.skipped(other):
            return grid.median(other, "seconds")
    return None


def columns(topic: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the columns that the Markdown table of a topic shows."""
    return [name for name in (*COLUMNS, *EXTRA_COLUMNS.get(topic, ())) if rows and name in rows[0]]
