"""The picture of an ablation: a panel per thing that was varied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lococo.ablation.grid import CENTRE
from lococo.ablation.table import BASELINE

Row = dict[str, Any]
TRAINED, UNTRAINED, CHANCE = "#4c72b0", "#333333", "#dd8452"


def plot_rows(rows: Sequence[Row], path: Path) -> None:
    """Perplexity against the number of slots, gap ratio against the kernel, gap ratio by kinds of slots.

    Error bars are those of the difference to the centre; the band is what other seeds make of the centre.
    """
    from matplotlib.figure import Figure

    varied = {row["varied"] for row in rows}
    panels: dict[str, Callable[[Any, Sequence[Row]], None]] = {
        "num_slots": _by_slots,
        "kernel_size": _by_kernel,
        "combine": _by_combination,
        "product": _all_cells,
    }
    shown = [name for name in panels if name in varied] or ["product"]
    lines = max(len(_of(rows, name)) for name in shown)
    figure = Figure(figsize=(4.6 * len(shown) + 0.4, max(3.6, 0.25 * lines + 1.4)), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False).flat, shown, strict=True):
        panels[name](axes, rows)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _of(rows: Sequence[Row], varied: str) -> list[Row]:
    """The centre and what differs from it in one thing."""
    return [row for row in rows if row["varied"] in (CENTRE, varied)]


def _by_slots(axes: Any, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import NullLocator

    for row in rows:
        if row["num_slots"] is None:
            axes.axhline(row["ppl"], color=UNTRAINED, linestyle="--", label=row["method"])
    cells = _of(rows, "num_slots")
    slots = sorted({row["num_slots"] for row in cells})
    names = dict.fromkeys(row["method"] for row in rows if row["varied"] == BASELINE and row["num_slots"])
    for index, name in enumerate([*names, "lococo"]):
        points = [row for row in (cells if name == "lococo" else rows) if row["method"] == name]
        points = sorted((row for row in points if row["num_slots"] in slots), key=lambda row: row["num_slots"])
        style = {"color": TRAINED, "linewidth": 2} if name == "lococo" else {"color": f"C{index + 1}", "linewidth": 1}
        x, y = [row["num_slots"] for row in points], [row["ppl"] for row in points]
        axes.plot(x, y, "o-", markersize=4, label=name, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(slots, [str(each) for each in slots])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="slots per layer and KV head (M)", ylabel="perplexity", title="memory size")
    axes.legend(frameon=False, fontsize=8)


def _by_kernel(axes: Any, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import NullLocator

    cells = sorted(_of(rows, "kernel_size"), key=lambda row: row["kernel_size"])
    x, y = [row["kernel_size"] for row in cells], _gaps(cells)
    _band(axes.axhspan, rows)
    axes.errorbar(x, y, yerr=_errors(cells), fmt="o-", color=TRAINED, capsize=3, markersize=4, label="trained")
    axes.plot(x, _gaps(cells, "untrained_gap_ratio"), "_", color=UNTRAINED, markersize=9, label="not trained")
    axes.set_xscale("log")
    axes.set_xticks(x, [str(each) for each in x])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="kernel size", ylabel="gap ratio (1 is H2O, 0 the full cache)", title="kernel size")
    axes.legend(frameon=False, fontsize=8)


def _by_combination(axes: Any, rows: Sequence[Row]) -> None:
    cells = sorted(_of(rows, "combine"), key=lambda row: row["num_fused"], reverse=True)
    _bars(axes, rows, cells, [row["combination"].replace("+", " + ") for row in cells])
    axes.set_title("kinds of slots")


def _all_cells(axes: Any, rows: Sequence[Row]) -> None:
    cells = [row for row in rows if row["varied"] != BASELINE]
    labels = [f"{row['combination']}, M {row['num_slots']}, kernel {row['kernel_size']}" for row in cells]
    _bars(axes, rows, cells, labels)


def _bars(axes: Any, rows: Sequence[Row], cells: Sequence[Row], labels: Sequence[str]) -> None:
    places, trained, untrained = range(len(cells)), _gaps(cells), _gaps(cells, "untrained_gap_ratio")
    _band(axes.axvspan, rows)
    axes.barh(places, trained, xerr=_errors(cells), color=TRAINED, capsize=2, height=0.6, label="trained")
    axes.plot(untrained, places, "|", color=UNTRAINED, markersize=12, label="not trained")
    axes.axvline(1, color=UNTRAINED, linewidth=0.8, linestyle=":")
    axes.set_yticks(places, labels, fontsize=8)
    axes.set(ylim=(len(cells) - 0.4, -0.6), xlabel="gap ratio (1 is H2O, 0 the full cache)")
    axes.legend(frameon=False, fontsize=8)


def _gaps(rows: Sequence[Row], name: str = "gap_ratio") -> list[float]:
    return [float("nan") if row[name] is None else row[name] for row in rows]


def _errors(cells: Sequence[Row]) -> list[list[float]]:
    """Below and above each cell, of its difference to the centre."""
    known = [(row["change"], row["change_low"], row["change_high"]) for row in cells]
    below = [0.0 if low is None else change - low for change, low, _ in known]
    above = [0.0 if high is None else high - change for change, _, high in known]
    return [below, above]


def _band(span: Callable[..., Any], rows: Sequence[Row]) -> None:
    """What chance does: the centre with every seed."""
    found = [row["gap_ratio"] for row in _of(rows, "seed") if row["gap_ratio"] is not None]
    if len(found) > 1:
        span(min(found), max(found), color=CHANCE, alpha=0.35, linewidth=0, label=f"centre, {len(found)} seeds")
