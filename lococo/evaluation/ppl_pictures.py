"""Pictures of perplexity: by domain, by number of slots, by length."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def plot_by_domain(rows: Sequence[Row], path: Path) -> None:
    """Loss over the full cache by domain and method, at the smallest number of slots and the largest length."""
    from matplotlib.figure import Figure

    rows = _longest(rows)
    slots = min(row["num_slots"] for row in rows if row["num_slots"])
    shown = [row for row in rows if row["num_slots"] == slots]
    full = {row["domain"]: row["nll"] for row in rows if row["method"] == "full"}
    domains, methods = _domains(shown), list(dict.fromkeys(row["method"] for row in shown))
    nll = {(row["domain"], row["method"]): row["nll"] for row in shown}
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(methods)
    for index, method in enumerate(methods):
        places = [place + (index - (len(methods) - 1) / 2) * width for place in range(len(domains))]
        axes.bar(places, [nll[domain, method] - full[domain] for domain in domains], width, label=method)
    axes.set_xticks(range(len(domains)), domains)
    axes.set_ylabel("loss over the full cache (nats per token)")
    length = max(row["length"] for row in shown)
    axes.set_title(f"{slots} slots, texts of {length} tokens; lower is better, 0 is the full cache")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def plot_by_slots(rows: Sequence[Row], path: Path) -> None:
    """Perplexity against the number of slots, a panel per domain and a line per method, at the largest length."""
    _plot_lines(_longest(rows), "num_slots", "slots per layer and KV head (M)", _method, path)


def plot_by_length(rows: Sequence[Row], path: Path, cut: float = math.inf) -> None:
    """Perplexity against the length, a panel per domain and a line per method and number of slots.

    A panel ends at ``cut`` times its median, and says so, so that one line that goes far off hides no others.
    """
    several = len({row["num_slots"] for row in rows if row["num_slots"]}) > 1
    _plot_lines(rows, "length", "tokens in a text", _method_and_slots if several else _method, path, cut)


def _method(row: Row) -> str:
    return row["method"]


def _method_and_slots(row: Row) -> str:
    return f"{row['method']} {row['num_slots'] or ''}".strip()


def _plot_lines(
    rows: Sequence[Row], x: str, label: str, name: Callable[[Row], str], path: Path, cut: float = math.inf
) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    domains, names = _domains(rows), list(dict.fromkeys(map(name, rows)))
    columns = min(len(domains), 4)
    lines = -(-len(domains) // columns)
    figure = Figure(figsize=(max(6, 3.2 * columns), 2.8 * lines + 0.8), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for domain, axes in zip(domains, panels, strict=False):
        for index, each in enumerate(names):
            points = [row for row in rows if row["domain"] == domain and name(row) == each]
            style: dict[str, Any] = {"color": f"C{index}", "label": each}
            if points and points[0][x] is None:
                axes.axhline(points[0]["ppl"], linestyle="--", **style)
                continue
            points.sort(key=lambda row: row[x])
            axes.plot([row[x] for row in points], [row["ppl"] for row in points], "o-", markersize=4, **style)
        ticks = sorted({row[x] for row in rows if row["domain"] == domain and row[x] is not None})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        found = [row["ppl"] for row in rows if row["domain"] == domain]
        top = cut * statistics.median(found)
        axes.set_title(f"{domain}, cut at the top" if max(found) > top else domain, fontsize=10)
        if max(found) > top:
            axes.set_ylim(top=top)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(panels):
        axes.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    fitting = int(figure.get_figwidth() / (0.085 * max(map(len, names)) + 0.5))  # columns of labels
    figure.legend(handles, labels, frameon=False, loc="outside upper center", ncols=max(1, min(len(names), fitting)))
    figure.supxlabel(label, fontsize=10)
    figure.supylabel("perplexity (lower is better)", fontsize=10)
    figure.savefig(path, dpi=110)


def _domains(rows: Sequence[Row]) -> list[str]:
    """In order, the one for all of them last."""
    return sorted(dict.fromkeys(row["domain"] for row in rows), key=lambda domain: domain == "all")


def _longest(rows: Sequence[Row]) -> list[Row]:
    """The rows of every domain's largest length."""
    largest = {domain: max(row["length"] for row in rows if row["domain"] == domain) for domain in _domains(rows)}
    return [row for row in rows if row["length"] == largest[row["domain"]]]
