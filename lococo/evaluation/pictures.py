"""Pictures that several results share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def plot_before_and_after(
    labels: Sequence[str], before: Sequence[float], after: Sequence[float], xlabel: str, path: Path
) -> None:
    """A bar for what training reached, a mark for where it began, one row per label from top to bottom."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.22 * len(labels) + 1.2), layout="constrained")
    axes = figure.subplots()
    places = range(len(labels))
    axes.barh(places, after, color="#4c72b0", label="trained")
    axes.plot(before, places, "k|", markersize=9, label="not trained")
    axes.set_yticks(places, labels, fontsize=8)
    axes.set(xlim=(0, 1.2 * sorted(after)[len(after) * 9 // 10]), ylim=(len(labels), -1))
    axes.set_xlabel(f"{xlabel}; what is longer is cut")
    figure.legend(frameon=False, loc="outside upper center", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
