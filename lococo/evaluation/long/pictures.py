"""Pictures of scores by task and method, and of needles by depth and length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def plot_scores(rows: Sequence[Row], path: Path) -> None:
    """A bar per task and method, with its standard error."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(_task(row) for row in rows))
    methods = list(dict.fromkeys(_method(row) for row in rows))
    figure = Figure(figsize=(8, 1.5 + 0.18 * len(tasks) * (len(methods) + 1)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(methods)
    for index, method in enumerate(methods):
        shown = [row for row in rows if _method(row) == method]
        places = [tasks.index(_task(row)) + (index - (len(methods) - 1) / 2) * height for row in shown]
        errors = [row["stderr"] or 0 for row in shown]
        axes.barh(places, [row["score"] for row in shown], height, xerr=errors, label=method, error_kw={"lw": 0.8})
    axes.set_yticks(range(len(tasks)), tasks)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="score, with its standard error")
    figure.legend(frameon=False, loc="outside upper center", ncols=3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def plot_needles(needles: Sequence[Row], path: Path) -> None:
    """A heat map per task and method: what was found, by depth of the needle and length of the text."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in needles))
    methods = list(dict.fromkeys(_method(row) for row in needles))
    lengths = sorted({row["length"] for row in needles})
    depths = sorted({row["depth"] for row in needles})
    size = (1.5 + 2.2 * len(methods), 0.6 + 2.4 * len(tasks))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(tasks), len(methods), squeeze=False, sharex=True, sharey=True)
    for task, line in zip(tasks, grid, strict=True):
        for method, axes in zip(methods, line, strict=True):
            found = {
                (row["depth"], row["length"]): row["score"]
                for row in needles
                if (row["task"], _method(row)) == (task, method)
            }
            table = [[found.get((depth, length), float("nan")) for length in lengths] for depth in depths]
            image = axes.imshow(table, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            axes.set_xticks(range(len(lengths)), map(str, lengths), fontsize=7)
            axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=7)
            axes.set_title(f"{task}\n{method}", fontsize=7)
    figure.supxlabel("tokens", fontsize=8)
    figure.supylabel("depth of the needle", fontsize=8)
    figure.colorbar(image, ax=grid, label="found", shrink=0.8)
    figure.savefig(path, dpi=110)


def _task(row: Row) -> str:
    return f"{row['task']} {row['length']}"


def _method(row: Row) -> str:
    return f"{row['method']} {row['num_slots']}" if row["num_slots"] else row["method"]
