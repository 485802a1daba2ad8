"""Pictures of results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

GIB = 2**30
# What a topic's panels show: labels of the axes, and the value of a row for a time in seconds.
SPEED: dict[str, tuple[str, str, Callable[[Row, float], float]]] = {
    "prefill": ("tokens in the text", "tokens read per second", lambda row, s: row["length"] * row["batch"] / s),
    "decode": ("tokens in the cache", "milliseconds per step", lambda row, s: 1000 * s),
    "train": ("tokens in a window", "milliseconds per token", lambda row, s: 1000 * s),
    "extend": ("tokens in a window", "milliseconds per token", lambda row, s: 1000 * s),
}


def plot(topic: str, rows: Sequence[Row], path: Path) -> None:
    """Draw the measured rows of a topic into a PNG file; none if no time was taken. One not taken is a gap."""
    measured = [{**row, **_gaps(row)} for row in rows if row["median"] is not None or row.get("peak_bytes")]
    if any(row["median"] is not None for row in rows):
        _plot_scores(measured, path) if topic == "score" else _plot_lengths(topic, measured, path)


def _gaps(row: Row) -> Row:
    return {name: math.nan for name in ("median", "min", "max", "limit_seconds") if row[name] is None}


def _plot_lengths(topic: str, rows: Sequence[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    batches = sorted({row["batch"] for row in rows})
    has_memory = any(row["peak_bytes"] for row in rows)
    figure = Figure(figsize=(max(7, 4 * len(batches)), 8 if has_memory else 4.5), layout="constrained")
    panels = figure.subplots(1 + has_memory, len(batches), squeeze=False, sharex=True, sharey="row")
    x_label, y_label, value = SPEED[topic]
    for column, batch in enumerate(batches):
        for index, name in enumerate(dict.fromkeys(map(line_name, rows))):
            line = [row for row in rows if row["batch"] == batch and line_name(row) == name]
            line.sort(key=lambda row: row["length"])
            lengths = [row["length"] for row in line]
            speed, color = panels[0, column], f"C{index}"
            speed.plot(lengths, [value(row, row["median"]) for row in line], "o-", color=color, label=name)
            speed.plot(lengths, [value(row, row["limit_seconds"]) for row in line], ":", color=color, linewidth=1)
            spread = [[value(row, row[end]) for row in line] for end in ("min", "max")]
            speed.fill_between(lengths, *spread, color=color, alpha=0.2, linewidth=0)
            if has_memory:
                peaks = [row["peak_bytes"] / GIB if row["peak_bytes"] else float("nan") for row in line]
                panels[1, column].plot(lengths, peaks, "o-", color=color)
        panels[0, column].set_title(f"batch {batch}")
        _scale_axes(panels[:, column], sorted({row["length"] for row in rows}))
        panels[-1, column].set_xlabel(x_label)
    panels[0, 0].set_yscale("log")
    panels[0, 0].set_ylabel(y_label)
    if has_memory:
        panels[1, 0].set_ylabel("peak memory (GiB)")
        panels[1, 0].set_ylim(0, 1.1 * max(row["peak_bytes"] or 0 for row in rows) / GIB)
    figure.suptitle(f"{rows[0]['shape']}, {rows[0]['dtype']}; dotted: the least time the device allows")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


def _scale_axes(panels: Any, lengths: Sequence[int]) -> None:
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [thousands(length) for length in lengths])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)


def _plot_scores(rows: Sequence[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    scored = [row for row in rows if row.get("score_share") is not None]
    if not scored:
        return
    figure = Figure(figsize=(7, 1 + 0.5 * len(scored)), layout="constrained")
    axes = figure.subplots()
    names = [f"{line_name(row)}, batch {row['batch']}" for row in scored]
    axes.barh(names, [100 * row["score_share"] for row in scored])
    axes.invert_yaxis()
    axes.set_xlabel("time of scoring (% of a layer reading a block)")
    axes.set_title(f"{scored[0]['shape']}, {scored[0]['dtype']}, blocks of {scored[0]['block_size']} tokens")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def line_name(row: Row) -> str:
    """What rows of one line in a picture have in common."""
    slots = f", {row['num_slots']} slots" if row["num_slots"] else ""
    objective = f", {row['objective']}" if row["objective"] else ""
    return f"{row['method']}{slots}{objective}"


def thousands(length: int) -> str:
    """A length as people write it: 4K for 4096."""
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)
